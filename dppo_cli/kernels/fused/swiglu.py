"""silu(gate) * up, with silu(x) = x / (1 + exp(-x)), in one kernel each way (arXiv 2002.05202).

It is rounded after silu and after the product, as in plain operations. Gate and up alone are kept for the backward
pass, in which the gradients are, with s = 1 / (1 + exp(-gate)),
    of up: g silu(gate),  of gate: (g up) s (1 + gate (1 - s)),
and silu and g up are rounded.

Shapes: N rows of I numbers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_cli.kernels.fused.norm import in_rows

BLOCK = 2048
"""Numbers of a row that one program computes."""


@triton.jit
def swiglu_forward(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    kind = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(kind).to(tl.float32)
    tl.store(out_ptr + row * size + column, (silu * up).to(kind), mask=inside)


@triton.jit
def swiglu_backward(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    grad_stride,
    gate_stride,
    up_stride,
    size,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    kind = grad_gate_ptr.dtype.element_ty
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = (gate * sigmoid).to(kind).to(tl.float32)
    slope = (grad * up).to(kind).to(tl.float32)
    grad_gate = slope * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    tl.store(grad_up_ptr + row * size + column, (grad * silu).to(kind), mask=inside)
    tl.store(grad_gate_ptr + row * size + column, grad_gate.to(kind), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors [..., I] in 16 bits."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call,no-any-return]
    return _forward(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_NI, gate_NI, up_NI = (in_rows(x) for x in (grad, gate, up))
        grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
        if gate.numel():
            grid, options = _tiles(gate_NI)
            strides = (x.stride(0) for x in (grad_NI, gate_NI, up_NI))
            swiglu_backward[grid](grad_NI, gate_NI, up_NI, grad_gate, grad_up, *strides, gate.shape[-1], **options)
        return grad_gate, grad_up


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    gate_NI, up_NI = in_rows(gate), in_rows(up)
    out = gate.new_empty(gate.shape)
    if gate.numel():
        grid, options = _tiles(gate_NI)
        swiglu_forward[grid](gate_NI, up_NI, out, gate_NI.stride(0), up_NI.stride(0), gate.shape[-1], **options)
    return out


def _tiles(x_NI: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and options."""
    rows, size = x_NI.shape
    block = min(BLOCK, triton.next_power_of_2(size))
    return (rows, triton.cdiv(size, block)), {"BLOCK": block, "enable_fp_fusion": False}
