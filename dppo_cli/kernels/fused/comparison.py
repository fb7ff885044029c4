"""Whether the kernels that a model's modules would use compute on this device what the modules do."""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.phi3.modeling_phi3 import Phi3DecoderLayer

from dppo_cli.kernels.fused import layers
from dppo_cli.kernels.layer_parts import NORMS, act_of
from dppo_cli.kernels.probe import apart

CLOSE = 0.02
"""Differences from plain operations that are rounding in 16 bits, relative to the largest number."""
CONFIGS: tuple[Any, ...] = (
    *(LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config),
    *(Phi3Config, SmolLM3Config, Olmo2Config, Gemma3TextConfig),
)
HIDDEN, HEAD = 896, 64
"""A hidden size that fills no tile, and a size of heads."""


@torch.inference_mode(False)
@torch.enable_grad()
def difference(model: nn.Module, device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of outputs and gradients from plain operations, relative to the largest number of each.

    With the norm, the activation and the rotation of the model's family, which its modules have before `make_fused`;
    heads have the strides that transformers gives them.
    """
    layer: Any = next(module for module in model.modules() if type(module) in NORMS)
    kind: Any = type(next(getattr(layer, name) for name in NORMS[type(layer)] if name is not None))
    plain_rotation = getattr(sys.modules[type(layer.self_attn).__module__], layers.ROTATION)
    act = act_of(layer.mlp)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def norm_of(size: int) -> Any:
        made = kind(size).to(device, dtype).requires_grad_(False)
        made.weight.copy_(random(size))
        return made

    turned = HEAD * 3 // 4 if type(layer) is Phi3DecoderLayer else HEAD
    angle = torch.outer(torch.arange(5.0), torch.arange(1.0, turned / 2 + 1)).repeat(1, 2)[None]
    wide = torch.float32 if type(layer) is Olmo2DecoderLayer else dtype
    angles = angle.cos().to(device, wide), angle.sin().to(device, wide)
    wide_norm, x, delta = norm_of(HIDDEN), random(3, HIDDEN), random(3, HIDDEN)
    of = layers.weight_of(wide_norm)
    q, k = (random(2, 5, heads, HEAD).transpose(1, 2) for heads in (6, 2))
    both_ways: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda x: layers.rms_norm(x, *of), wide_norm, (x,)),
        (lambda q, k: layers.rotate(q, k, *angles), lambda q, k: plain_rotation(q, k, *angles), (q, k)),
    ]
    gated = layers.gate_of(act)
    if gated is not None:
        both_ways.append((gated, lambda gate, up: act(gate) * up, (random(3, 80), random(3, 80))))
    pairs = [
        pair
        for kernel, plain, given in both_ways
        for pair in zip(_results(kernel, given), _results(plain, given), strict=True)
    ]
    total = x + delta
    pairs += zip(layers.add_and_norm(x, delta, *of), (total, wide_norm(total)), strict=True)
    q_norm = getattr(layer.self_attn, "q_norm", None)
    if q_norm is not None and q_norm.weight.numel() == layer.self_attn.head_dim:
        q_norm, k_norm = norm_of(HEAD), norm_of(HEAD)
        _, eps, form = layers.weight_of(q_norm)
        found = layers.norm_and_rotate(q, k, *angles, q_norm.weight, k_norm.weight, eps, form)
        pairs += zip(found, plain_rotation(q_norm(q), k_norm(k), *angles), strict=True)
    return apart(pairs)


def difference_in_all_families(device: torch.device, dtype: torch.dtype) -> float:
    """Of a small random model of each, where there is no other."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "pad_token_id": 0,
    }
    models = [
        AutoModelForCausalLM.from_config(kind(**sizes, num_attention_heads=4, num_key_value_heads=2))
        for kind in CONFIGS
    ]
    return float(torch.tensor([difference(model, device, dtype) for model in models]).max())


def _results(run: Callable[..., Any], given: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the gradients of the inputs from a gradient of their own."""
    inputs = [x.detach().requires_grad_() for x in given]
    outputs = run(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, [x.detach().cos() for x in outputs])]
