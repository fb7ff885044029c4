"""Tiny random models of the common architectures, with a character tokenizer, in Hugging Face folders."""

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

CHARACTERS = "0123456789+-=? abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:<>|/\n"
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=256)
GROUPED = dict(SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8)

CONFIGS: dict[str, PretrainedConfig] = {
    "llama3": LlamaConfig(**GROUPED, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}),
    "qwen3": Qwen3Config(**GROUPED, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256),
    # A soft cap on the logits, and layers that see only a window.
    "gemma2": Gemma2Config(**GROUPED, sliding_window=6, final_logit_softcapping=5.0, query_pre_attn_scalar=8),
    # A multiplier on the logits.
    "cohere2": Cohere2Config(**GROUPED, sliding_window=6, logit_scale=0.25),
}


def tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    """Character by character; ids 0 and 1 are <pad> and <eos>."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    backend = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = Split(Regex("."), "isolated")
    backend.decoder = Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save(folder: Path, architecture: str = "llama3", seed: int = 0, vocabulary: int = 96) -> Path:
    """A random model; `vocabulary` is larger than the tokenizer's, as padded vocabularies are."""
    config = CONFIGS[architecture].__class__.from_dict(CONFIGS[architecture].to_dict())
    config.vocab_size = vocabulary
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, 1, 1
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    # Far from uniform, so that log-probs differ and mistakes show.
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.3)
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
