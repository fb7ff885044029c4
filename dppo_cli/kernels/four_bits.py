"""What bitsandbytes' 4-bit layers hold. Shapes: I inputs, O outputs of a layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

BLOCK = 64
"""Weights with one scale."""
MOST_ROWS = 256
"""Most rows that `fused.nf4` multiplies with weights in NF4. Every weight is decoded for each 128 rows. On an H100 256
rows take about as long as dequantising and cuBLAS."""


def is_4_bit(layer: Any) -> bool:
    """Whether it is a `Linear4bit`, without importing bitsandbytes, which takes seconds."""
    return any(
        kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes") for kind in type(layer).mro()
    )


def dequantizer(layer: Any) -> Callable[[Tensor], Tensor] | None:
    """W [O, I] of a 4-bit layer's codes; None if the layer multiplies by other means, or in another precision."""
    from bitsandbytes.functional import dequantize_4bit

    state = getattr(layer.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return None
    if layer.compute_dtype not in (None, state.dtype):
        return None
    return lambda codes: dequantize_4bit(codes, state)


def why_not(layer: Any, dtype: torch.dtype) -> str | None:
    """Why the kernel of `fused.nf4` cannot compute a 4-bit layer in a precision, in words; None if it can."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False):
        return "its weights are not quantised, or packed for a CPU"
    if state.quant_type != "nf4":
        return f"its weights are in {state.quant_type}, not nf4"
    if weight.dtype != torch.uint8:
        return f"its codes are stored as {str(weight.dtype).removeprefix('torch.')}, not uint8"
    if state.blocksize != BLOCK:
        return f"a scale belongs to {state.blocksize} weights, not {BLOCK}"
    outputs, inputs = state.shape
    if inputs % BLOCK:
        return f"it has {inputs} inputs, no multiple of {BLOCK}"
    if outputs % 8:
        return f"it has {outputs} outputs, no multiple of 8"
    if not dtype == state.dtype == layer.compute_dtype:
        return f"it is made for {str(state.dtype).removeprefix('torch.')}"
    return None


def scales_of(state: Any) -> Tensor:
    """float32, one for `BLOCK` weights, as `dequantize_4bit` computes them."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    found: Tensor = dequantize_blockwise(state.absmax, state.state2) + state.offset
    return found.float()


def biases_of(layers: Sequence[Any]) -> Tensor | None:
    """One after the other, zeros for layers without one; None if none has."""
    of = next((layer.bias for layer in layers if layer.bias is not None), None)
    if of is None:
        return None
    parts = [of.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    return torch.cat(parts)
