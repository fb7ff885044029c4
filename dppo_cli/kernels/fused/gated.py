"""act(gate) * up in one kernel each way (GLU variants, arXiv 2002.05202), for two activations:

    SwiGLU  silu(x) = x / (1 + exp(-x)),
    GEGLU   gelu(x) = x (1 + tanh u) / 2 = x / (1 + exp(-2 u)),  u = sqrt(2 / pi) (x + 0.044715 x^3),
the second as in arXiv 1606.08415.

It is rounded after the activation and after the product, as in plain operations. Gate and up alone are kept for the
backward pass, in which the gradients are
    of up: g act(gate),  of gate: (g up) act'(gate),
and act(gate) and g up are rounded. With s the factor of x above,
    silu'(x) = s (1 + x (1 - s)),  gelu'(x) = s + x s (1 - s) 2 sqrt(2 / pi) (1 + 3 * 0.044715 x^2).

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
def _activated(x, GELU: tl.constexpr):
    """The activation and its derivative."""
    if GELU:
        # sqrt(2 / pi), and three times 0.044715. The bound of the exponent keeps it finite.
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        s = 1.0 / (1.0 + tl.exp(tl.minimum(-2.0 * u, 80.0)))
        slope = 2.0 * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
        return x * s, s + x * s * (1.0 - s) * slope
    divisor = 1.0 + tl.exp(-x)
    s = 1.0 / divisor
    return x / divisor, s * (1.0 + x * (1.0 - s))


@triton.jit
def gated_forward(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, size, BLOCK: tl.constexpr, GELU: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    kind = out_ptr.dtype.element_ty
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    act, _ = _activated(gate, GELU)
    tl.store(out_ptr + row * size + column, (act.to(kind).to(tl.float32) * up).to(kind), mask=inside)


@triton.jit
def gated_backward(
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
    GELU: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    kind = grad_gate_ptr.dtype.element_ty
    grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    act, slope = _activated(gate, GELU)
    grad_gate = (grad * up).to(kind).to(tl.float32) * slope
    tl.store(grad_up_ptr + row * size + column, (grad * act.to(kind).to(tl.float32)).to(kind), mask=inside)
    tl.store(grad_gate_ptr + row * size + column, grad_gate.to(kind), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors [..., I] in 16 bits."""
    return _gated(gate, up, gelu=False)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up of two tensors [..., I] in 16 bits, with gelu's approximation by tanh."""
    return _gated(gate, up, gelu=True)


def _gated(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        return _Gated.apply(gate, up, gelu)  # type: ignore[no-untyped-call,no-any-return]
    return _forward(gate, up, gelu)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _forward(gate, up, gelu)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        grad_NI, gate_NI, up_NI = (in_rows(x) for x in (grad, gate, up))
        grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
        if gate.numel():
            grid, options = _tiles(gate_NI)
            strides = (x.stride(0) for x in (grad_NI, gate_NI, up_NI))
            gated_backward[grid](
                *(grad_NI, gate_NI, up_NI, grad_gate, grad_up, *strides, gate.shape[-1]), **options, GELU=ctx.gelu
            )
        return grad_gate, grad_up, None


def _forward(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    gate_NI, up_NI = in_rows(gate), in_rows(up)
    out = gate.new_empty(gate.shape)
    if gate.numel():
        grid, options = _tiles(gate_NI)
        gated_forward[grid](
            *(gate_NI, up_NI, out, gate_NI.stride(0), up_NI.stride(0), gate.shape[-1]), **options, GELU=gelu
        )
    return out


def _tiles(x_NI: Tensor) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and options."""
    rows, size = x_NI.shape
    block = min(BLOCK, triton.next_power_of_2(size))
    return (rows, triton.cdiv(size, block)), {"BLOCK": block, "enable_fp_fusion": False}
