"""What gpu.py measures: a policy with random weights in the shapes of Llama 3.1 8B, made on the device in seconds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import config_dir
from dppo_cli.kernels.devices import set_up
from dppo_cli.kernels.fuse import fuse
from dppo_cli.kernels.low_rank import make_lean
from dppo_cli.policy.adapter import add_adapter
from dppo_cli.policy.policy import Policy

NO_END = (-1,)
"""No token ends a response, so all have the length that was asked for."""
SPECIAL = ("pad", "end", "unknown")
"""The first tokens."""


@dataclass(frozen=True)
class Size:
    """Shapes of a model, and the lengths and numbers of sequences that are measured with it."""

    model: dict[str, Any]
    prompt: int
    new: int  # of the update and the whole step
    decoded: int  # of the decoding steps
    rows: tuple[int, ...]
    prompts: int = 8
    group: int = 8
    config: Callable[..., PretrainedConfig] = LlamaConfig

    @property
    def layer_parameters(self) -> int:
        """Of all layers: what is quantised."""
        of = self.model
        heads = of["num_attention_heads"] + of["num_key_value_heads"]
        attention = 2 * of["hidden_size"] * heads * of["head_dim"]
        return int(of["num_hidden_layers"] * (attention + 3 * of["hidden_size"] * of["intermediate_size"]))

    @property
    def head_parameters(self) -> int:
        return int(self.model["hidden_size"] * self.model["vocab_size"])

    @property
    def cache_bytes(self) -> int:
        """Keys and values of a token, in 16 bits."""
        of = self.model
        return int(4 * of["num_hidden_layers"] * of["num_key_value_heads"] * of["head_dim"])


LLAMA_8B = Size(
    dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
    prompt=256,
    new=512,
    decoded=128,
    rows=(8, 64, 256),
)
TINY = Size(
    dict(
        hidden_size=64,  # of NF4's blocks
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=96,
        max_position_embeddings=512,
    ),
    prompt=8,
    new=8,
    decoded=4,
    rows=(2, 4),
    prompts=2,
    group=2,
)


def config(size: Size, *words: str) -> TrainConfig:
    """What `dppo train <words>` builds for a step of this size."""
    batch = (f"batch.prompts_per_step={size.prompts}", f"batch.prompts_per_update={size.prompts}")
    words = ("model=hf", "model.path=none", *batch, f"batch.samples_per_prompt={size.group}", *words)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return build(TrainConfig, compose("train", [*words, f"sampling.max_new_tokens={size.new}"]))


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A word for each token: w3, w4, ... after those of `SPECIAL`, which are found inside of words, too."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), vocabulary))]
    backend = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="unknown"))
    backend.pre_tokenizer = WhitespaceSplit()
    special = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


@torch.no_grad()
def plain_model(size: Size, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Normal weights of deviation 0.02; a larger last norm leaves the next token a few nats of entropy."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(size.config(**size.model, initializer_range=0.02), dtype=dtype)
    model.model.norm.weight.fill_(4.0)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 1, 0
    return model.requires_grad_(False).eval()  # type: ignore[no-any-return]


def policy(size: Size, device: torch.device, of: TrainConfig) -> Policy:
    """With the config's adapter, base and recomputation, as if its weights had been loaded."""
    set_up(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = plain_model(size, device, dtype)
    if of.adapter.quantization is not None:
        quantise(model, device, dtype)
    peft = add_adapter(model, of.adapter, "random")
    if of.hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    make_lean(model, device)
    fuse(model, device, dtype, print)
    model.train(of.hardware.gradient_checkpointing)
    words = tokenizer(size.model["vocab_size"])
    return Policy(model, peft, words, "random", device, dtype, NO_END, 0)


def quantise(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """All linear layers but the head in NF4 with double quantisation, layer by layer, in place."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and name != "lm_head"}
    for name, layer in linear.items():
        made: Any = Linear4bit(
            *(layer.in_features, layer.out_features),
            bias=False,
            compute_dtype=dtype,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        made.weight = Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
        )
        made.weight = made.weight.to(device)
        if hasattr(made, "support_avx512bf16_for_cpu"):
            made.support_avx512bf16_for_cpu = False
        model.set_submodule(name, made)
    # What PEFT and the sampler ask a model that transformers has quantised.
    model.is_loaded_in_4bit = model.is_quantized = True  # type: ignore[assignment]
