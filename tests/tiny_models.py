"""Tiny random models of the architectures behind conf/model/, each in the class that its checkpoints name."""

from pathlib import Path

import tiny
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SmolLM3Config,
)

VOCABULARY = 96
"""More than the tokenizer has, as in models whose vocabulary is padded to a round number."""
SIZE = dict(tiny.GROUPED, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=1)
WINDOW = dict(SIZE, sliding_window=6)
TIED = dict(SIZE, tie_word_embeddings=True)
LONGROPE_LIMIT = 64
BLOCKS = dict(hidden_size=64, intermediate_size=128, head_dim=16)
"""Sizes of which NF4's blocks are a part, as in models that people use."""

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.0, 2.0, 8.0],
}
GEMMA3_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
GEMMA3 = Gemma3TextConfig(
    **WINDOW,
    query_pre_attn_scalar=8,
    layer_types=["sliding_attention", "full_attention"],
    rope_parameters=GEMMA3_ROPE,
    tie_word_embeddings=True,
)
SAMPLED_FROM_GEMMA3 = (2, 12, 31, 35, 54, 61, 63, 64, 67, 68, 95)
"""Tokens that are sampled now and then. Most are not at all, because its embeddings are scaled."""
VISION = SiglipVisionConfig(
    hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)

FAMILIES: dict[str, PretrainedConfig] = {
    # Frequencies scaled as in Llama 3.1 and 3.2.
    "llama": LlamaConfig(**TIED, rope_parameters=LLAMA3_ROPE),
    # Biases of queries, keys and values.
    "qwen2": Qwen2Config(**TIED),
    # Norms of queries and keys.
    "qwen3": Qwen3Config(**TIED),
    # Layers with a window, whose rotary frequencies are other ones.
    "gemma3": GEMMA3,
    "gemma3_vision": Gemma3Config(text_config=GEMMA3, vision_config=VISION, mm_tokens_per_image=4),
    "mistral": MistralConfig(**SIZE, sliding_window=None),
    # A window in every layer, as in Mistral 7B v0.1.
    "mistral_window": MistralConfig(**WINDOW),
    # One linear layer for queries, keys and values, one for gate and up; some dimensions are not rotated.
    "phi3": Phi3Config(**TIED, rope_parameters=LONGROPE, original_max_position_embeddings=LONGROPE_LIMIT),
    # A layer without rotary embedding.
    "smollm3": SmolLM3Config(**TIED, no_rope_layers=[1, 0]),
    # Norms after attention and MLP, and of the queries and keys of all heads together.
    "olmo2": Olmo2Config(**{key: value for key, value in SIZE.items() if key != "head_dim"}),
    # A soft cap on the logits.
    "gemma2": Gemma2Config(**WINDOW, final_logit_softcapping=5.0, query_pre_attn_scalar=8),
    # A multiplier on the logits.
    "cohere2": Cohere2Config(**WINDOW, logit_scale=0.25),
}


def save(folder: Path, family: str, **sizes: int) -> Path:
    """`sizes`: instead of those in `FAMILIES`."""
    config = FAMILIES[family].__class__.from_dict({**FAMILIES[family].to_dict(), **sizes})
    torch.manual_seed(0)
    model: PreTrainedModel
    if isinstance(config, Gemma3Config):
        model = Gemma3ForConditionalGeneration(config)
    else:
        model = AutoModelForCausalLM.from_config(config)
    # Far from uniform, so that log-probs differ and mistakes show. Biases and norms are random, too.
    for parameter in model.parameters():
        noise = 0.3 * torch.randn(parameter.shape)
        parameter.data = noise if parameter.ndim == 2 else parameter.data + noise
    model.generation_config.eos_token_id = 1
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder
