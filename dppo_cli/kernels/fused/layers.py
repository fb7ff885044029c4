"""The norms, gates and rotations of models of the known families by the kernels beside this module.

A module's class is replaced, as low_rank.py does: parameters, names and hooks stay. The new forward uses a kernel where
the input is in 16 bits on a GPU and the weight is frozen, and else is transformers' own.
"""

import types
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUTanh, SiLUActivation
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama import modeling_llama
from transformers.models.mistral import modeling_mistral
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3 import modeling_phi3
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.smollm3 import modeling_smollm3

from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.fused.gated import geglu, swiglu
from dppo_cli.kernels.fused.norm import GEMMA, LLAMA, OLMO, Form
from dppo_cli.kernels.fused.norm import add_and_norm as add_and_norm
from dppo_cli.kernels.fused.norm import rms_norm as rms_norm
from dppo_cli.kernels.fused.rotary import norm_and_rotate as norm_and_rotate
from dppo_cli.kernels.fused.rotary import rotate as rotate
from dppo_cli.kernels.layer_parts import Parts, act_of
from dppo_cli.kernels.token_step import AddAndNorm, Angles, Gated, Operations, Plain, Turn

DEVICES: tuple[str, ...] = (CUDA,)
ROTATION = "apply_rotary_pos_emb"
FAMILIES = (
    (modeling_llama, "Llama"),
    (modeling_mistral, "Mistral"),
    (modeling_qwen2, "Qwen2"),
    (modeling_qwen3, "Qwen3"),
    (modeling_phi3, "Phi3"),
    (modeling_smollm3, "SmolLM3"),
    (modeling_olmo2, "Olmo2"),
    (modeling_gemma3, "Gemma3"),
)


def has_kernels(x: Tensor) -> bool:
    return x.device.type in DEVICES and x.dtype in (torch.bfloat16, torch.float16)


def _takes(x: Tensor, weight: Tensor) -> bool:
    return has_kernels(x) and weight.dtype == x.dtype and not weight.requires_grad


def weight_of(norm: Any) -> tuple[Tensor, float, Form]:
    """What the kernel of a norm is called with besides x."""
    if isinstance(norm, Gemma3RMSNorm):
        return norm.weight, norm.eps, GEMMA
    return norm.weight, norm.variance_epsilon, OLMO if isinstance(norm, Olmo2RMSNorm) else LLAMA


class _Norm(nn.Module):
    weight: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        if not _takes(x, self.weight):
            return super().forward(x)  # type: ignore[no-any-return]
        if x.dim() == 4 and x.transpose(1, 2).is_contiguous():
            # Heads before positions, as Gemma 3 norms them; as rows they would be copied.
            return rms_norm(x.transpose(1, 2), *weight_of(self)).transpose(1, 2)
        return rms_norm(x, *weight_of(self))

    def operations(self) -> Operations | None:
        """What `TokenStep` computes with, in the precision of this module; None for plain operations."""
        return Fused() if _takes(self.weight, self.weight) else None


class _MLP(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        parts: Any = self
        gated = gate_of(act_of(parts))
        if gated is None or not has_kernels(x):
            return super().forward(x)  # type: ignore[no-any-return]
        if hasattr(parts, "gate_up_proj"):
            return parts.down_proj(gated(*parts.gate_up_proj(x).chunk(2, dim=-1)))  # type: ignore[no-any-return]
        return parts.down_proj(gated(parts.gate_proj(x), parts.up_proj(x)))  # type: ignore[no-any-return]


def gate_of(act: Any) -> Gated | None:
    """The kernel for an activation, if there is one."""
    if isinstance(act, SiLUActivation | nn.SiLU):
        return swiglu
    return geglu if isinstance(act, GELUTanh) and isinstance(act.act, partial) else None


def _rotation_or(plain: Callable[..., tuple[Tensor, Tensor]], wide: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """`wide`: the plain one takes angles in float32, and rounds the result."""

    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        alike = has_kernels(q) and q.dtype == k.dtype and cos.dtype == sin.dtype
        alike = alike and cos.dtype in (q.dtype, *([torch.float32] if wide else []))
        if more or named or not alike:
            return plain(q, k, cos, sin, *more, **named)
        return rotate(q, k, cos, sin)

    return rotation


def _with_rotation(attention: type[nn.Module], wide: bool) -> types.FunctionType | None:
    """A copy of the forward pass that calls the kernel for its rotation; None if it calls it by another name."""
    forward: Any = attention.forward
    if not isinstance(forward, types.FunctionType) or ROTATION not in forward.__code__.co_names:
        return None
    names = {**forward.__globals__, ROTATION: _rotation_or(forward.__globals__[ROTATION], wide)}
    made = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _kinds() -> dict[type[nn.Module], type[nn.Module]]:
    """The class that replaces each."""
    found: dict[type[nn.Module], type[nn.Module]] = {}

    def replace(plain: type[nn.Module], *mixin: type, **methods: Any) -> None:
        found[plain] = type(f"Fused{plain.__name__}", (*mixin, plain), {"__module__": __name__, **methods})

    for module, family in FAMILIES:
        replace(getattr(module, f"{family}RMSNorm"), _Norm)
        replace(getattr(module, f"{family}MLP"), _MLP)
        attention = getattr(module, f"{family}Attention")
        forward = _with_rotation(attention, wide=family == "Olmo2")
        if forward is not None:
            replace(attention, forward=forward)
    return found


KINDS = _kinds()
globals().update({kind.__name__: kind for kind in KINDS.values()})  # where pickle looks for them


def make_fused(model: nn.Module) -> None:
    """Let a model's modules use the kernels."""
    for module in model.modules():
        kind = KINDS.get(type(module))
        if kind is not None and not (issubclass(kind, _MLP) and gate_of(act_of(module)) is None):
            module.__class__ = kind


class Fused:
    """The operations of `TokenStep` by kernels."""

    def add_and_norm(self, norm: nn.Module | None, of_delta: nn.Module | None) -> AddAndNorm:
        first = None if of_delta is None else weight_of(of_delta)
        of = None if norm is None else weight_of(norm)

        def run(x: Tensor, delta: Tensor | None) -> tuple[Tensor, Tensor]:
            if delta is not None and first is not None:
                delta = rms_norm(delta, *first)
            if of is None:
                total = x if delta is None else x + delta
                return total, total
            return (x, rms_norm(x, *of)) if delta is None else add_and_norm(x, delta, *of)

        return run

    def turn(self, parts: Parts) -> Turn:
        if not parts.rotates:
            return lambda q, k, angles: (q, k)  # SmolLM3, which has no norms of them
        q_norm, k_norm = (getattr(parts.attention, name, None) for name in ("q_norm", "k_norm"))
        if q_norm is None or k_norm is None:
            return _each_position(rotate)
        (q_weight, eps, form), (k_weight, _, _) = weight_of(q_norm), weight_of(k_norm)
        if q_weight.numel() == parts.head_size:

            def of_each_head(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
                return norm_and_rotate(q, k, cos, sin, q_weight, k_weight, eps, form)

            return _each_position(of_each_head)

        def of_all_heads(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
            q, k = (rms_norm(x.flatten(1), w, eps, form).view_as(x) for x, w in ((q, q_weight), (k, k_weight)))
            return rotate(q, k, cos, sin)

        return _each_position(of_all_heads)

    def gated(self, parts: Parts) -> Gated:
        return gate_of(parts.act) or Plain().gated(parts)

    def angles(self, cos_A1D: Tensor, sin_A1D: Tensor) -> Angles:
        return cos_A1D, sin_A1D


def _each_position(run: Callable[..., tuple[Tensor, Tensor]]) -> Turn:
    """Heads [A, heads, D] as those of one position each, [A, heads, 1, D]."""

    def turn(q: Tensor, k: Tensor, angles: Angles) -> tuple[Tensor, Tensor]:
        q, k = run(q.unsqueeze(2), k.unsqueeze(2), *angles)
        return q.squeeze(2), k.squeeze(2)

    return turn
