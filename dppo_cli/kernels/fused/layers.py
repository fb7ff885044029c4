"""The norms, gates and rotations of models built like Llama by the kernels beside this module.

A module's class is replaced, as low_rank.py does: parameters, names and hooks stay. The new forward uses a kernel where
the input is in 16 bits on a GPU and the weight is frozen, and else is transformers' own.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.mistral import modeling_mistral
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.fused.norm import add_and_norm
from dppo_cli.kernels.fused.norm import norm as rms_norm
from dppo_cli.kernels.fused.rotary import norm_and_rotate, rotate
from dppo_cli.kernels.fused.swiglu import swiglu
from dppo_cli.kernels.llama import AddAndNorm, Gated, Operations, Plain, Turn

DEVICES: tuple[str, ...] = (CUDA,)
CLOSE = 0.02
"""Differences from plain operations that are rounding in 16 bits, relative to the largest number."""
ROTATION = "apply_rotary_pos_emb"


def has_kernels(x: Tensor) -> bool:
    return x.device.type in DEVICES and x.dtype in (torch.bfloat16, torch.float16)


def _takes(x: Tensor, weight: Tensor) -> bool:
    return has_kernels(x) and weight.dtype == x.dtype and not weight.requires_grad


class _Norm(nn.Module):
    variance_epsilon: float
    weight: nn.Parameter

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not _takes(hidden_states, self.weight):
            return super().forward(hidden_states)  # type: ignore[no-any-return]
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)

    def operations(self) -> Operations | None:
        """What `LlamaStep` computes with, in the precision of this module; None for plain operations."""
        return Fused() if _takes(self.weight, self.weight) else None


class _MLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not has_kernels(x):
            return super().forward(x)  # type: ignore[no-any-return]
        parts: Any = self
        return parts.down_proj(swiglu(parts.gate_proj(x), parts.up_proj(x)))  # type: ignore[no-any-return]


def _rotation_or(plain: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        alike = has_kernels(q) and q.dtype == k.dtype == cos.dtype == sin.dtype and q.shape[-1] == cos.shape[-1]
        if more or named or not alike:
            return plain(q, k, cos, sin, *more, **named)
        return rotate(q, k, cos, sin)

    return rotation


def _with_rotation(attention: type[nn.Module]) -> types.FunctionType | None:
    """A copy of the forward pass that calls the kernel for its rotation; None if it calls it by another name."""
    forward: Any = attention.forward
    if not isinstance(forward, types.FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    names = {**forward.__globals__, ROTATION: _rotation_or(forward.__globals__[ROTATION])}
    made = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """The class that replaces each."""
    found: dict[type[nn.Module], type[nn.Module]] = {}

    def replace(plain: type[nn.Module], *mixin: type, **methods: Any) -> None:
        found[plain] = type(f"Fused{plain.__name__}", (*mixin, plain), {"__module__": __name__, **methods})

    for module, family in (
        (modeling_llama, "Llama"),
        (modeling_mistral, "Mistral"),
        (modeling_qwen2, "Qwen2"),
        (modeling_qwen3, "Qwen3"),
    ):
        replace(getattr(module, f"{family}RMSNorm"), _Norm)
        replace(getattr(module, f"{family}MLP"), _MLP)
        attention = getattr(module, f"{family}Attention")
        forward = _with_rotation(attention)
        if forward is not None:
            replace(attention, forward=forward)
    return found


KINDS = _kinds()
globals().update({kind.__name__: kind for kind in KINDS.values()})  # where pickle looks for them


def is_silu(act: Any) -> bool:
    return isinstance(act, SiLUActivation | nn.SiLU)


def make_fused(model: nn.Module) -> None:
    """Let a model's modules use the kernels."""
    for module in model.modules():
        kind = KINDS.get(type(module))
        if kind is not None and not (issubclass(kind, _MLP) and not is_silu(module.act_fn)):
            module.__class__ = kind


class Fused:
    """The operations of `LlamaStep` by kernels."""

    def add_and_norm(self, norm: nn.Module) -> AddAndNorm:
        of: Any = norm
        weight_H, eps = of.weight, of.variance_epsilon

        def run(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
            if delta is None:
                return x, rms_norm(x, weight_H, eps)
            return add_and_norm(x, delta, weight_H, eps)

        return run

    def turn(self, attention: nn.Module) -> Turn:
        q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))

        def run(q: Tensor, k: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            q, k = q.unsqueeze(2), k.unsqueeze(2)
            if q_norm is None or k_norm is None:
                q, k = rotate(q, k, *angles)
            else:
                q, k = norm_and_rotate(q, k, *angles, q_norm.weight, k_norm.weight, q_norm.variance_epsilon)
            return q.squeeze(2), k.squeeze(2)

        return run

    def gated(self, mlp: nn.Module) -> Gated:
        return swiglu if is_silu(mlp.act_fn) else Plain().gated(mlp)

    def angles(self, cos_A1D: Tensor, sin_A1D: Tensor) -> tuple[Tensor, Tensor]:
        return cos_A1D, sin_A1D


@torch.inference_mode(False)
@torch.enable_grad()
def difference(device: torch.device, dtype: torch.dtype) -> float:
    """The largest difference of outputs and gradients from plain operations, relative to the largest number of each.

    With a hidden size that fills no tile, and heads with the strides that transformers gives them.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def norm_of(size: int) -> LlamaRMSNorm:
        made = LlamaRMSNorm(size).to(device, dtype).requires_grad_(False)
        made.weight.copy_(random(size))
        return made

    wide, q_norm, k_norm = norm_of(896), norm_of(64), norm_of(64)
    weight_H, eps = wide.weight, wide.variance_epsilon
    angle = torch.outer(torch.arange(5.0), torch.arange(1.0, 33.0)).repeat(1, 2)[None]
    angles = angle.cos().to(device, dtype), angle.sin().to(device, dtype)
    x, delta, gate, up = random(3, 896), random(3, 896), random(3, 80), random(3, 80)
    q, k = (random(2, 5, heads, 64).transpose(1, 2) for heads in (6, 2))
    both_ways: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda x: rms_norm(x, weight_H, eps), wide, (x,)),
        (lambda q, k: rotate(q, k, *angles), lambda q, k: apply_rotary_pos_emb(q, k, *angles), (q, k)),
        (swiglu, lambda gate, up: nn.functional.silu(gate) * up, (gate, up)),
    ]
    pairs = [
        pair
        for kernel, plain, given in both_ways
        for pair in zip(_results(kernel, given), _results(plain, given), strict=True)
    ]
    total = x + delta
    pairs += zip(add_and_norm(x, delta, weight_H, eps), (total, wide(total)), strict=True)
    turned = norm_and_rotate(q, k, *angles, q_norm.weight, k_norm.weight, eps)
    pairs += zip(turned, apply_rotary_pos_emb(q_norm(q), k_norm(k), *angles), strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def _results(run: Callable[..., Any], given: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the gradients of the inputs from a gradient of their own."""
    inputs = [x.detach().requires_grad_() for x in given]
    outputs = run(*inputs)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    return [*(x.detach() for x in outputs), *torch.autograd.grad(outputs, inputs, [x.detach().cos() for x in outputs])]
