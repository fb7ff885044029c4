"""RMSNorm (arXiv 1910.07467), y = w x / sqrt(mean(x^2) + eps), in one kernel each way.

Sums are those of transformers' modules: float32, rounded where these round. In most families the normalised value is
rounded before it is multiplied with the weight, and so is the product; see `Form`. In the backward pass, with g the
gradient of y times w, rounded if the value is, and r = 1 / sqrt(mean(x^2) + eps),
    gradient of x = r g - r^3 x mean(g x).

Kernels are compiled without fused multiplications and additions, so that all versions of Triton round alike.

Shapes: N rows of H numbers (the hidden size, or that of a head).
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Numbers of a program: one long row, or several short ones."""


@dataclass(frozen=True)
class Form:
    """How a family multiplies a normalised value with a weight: `rounds` it first, adds `offset` to the weight."""

    rounds: bool = True
    offset: float = 0.0


LLAMA, OLMO, GEMMA = Form(), Form(rounds=False), Form(rounds=False, offset=1.0)


@triton.jit
def norm_forward(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    out_ptr,
    scale_ptr,
    rows,
    x_stride,
    delta_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
    KEEPS: tl.constexpr,
    ROUNDS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None]
    inside = (row < rows - first) & (column < SIZE)
    kind = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32) + OFFSET
    x = tl.load(x_ptr + first * x_stride + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        delta = tl.load(delta_ptr + first * delta_stride + row * delta_stride + column, mask=inside, other=0.0)
        rounded = (x + delta.to(tl.float32)).to(kind)
        tl.store(sum_ptr + first * SIZE + row * SIZE + column, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / SIZE + eps)
    if KEEPS:
        tl.store(scale_ptr + first + row, scale, mask=row < rows - first)
    normal = x * scale
    if ROUNDS:
        normal = normal.to(kind).to(tl.float32)
    tl.store(out_ptr + first * SIZE + row * SIZE + column, (weight * normal).to(kind), mask=inside)


@triton.jit
def norm_backward(
    grad_ptr,
    x_ptr,
    scale_ptr,
    weight_ptr,
    out_ptr,
    rows,
    grad_stride,
    x_stride,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ROUNDS: tl.constexpr,
    OFFSET: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None]
    inside = (row < rows - first) & (column < SIZE)
    kind = out_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32) + OFFSET
    grad = tl.load(grad_ptr + first * grad_stride + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + first * x_stride + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + first + row, mask=row < rows - first, other=0.0)
    grad = grad * weight
    if ROUNDS:
        grad = grad.to(kind).to(tl.float32)
    slope = tl.sum(grad * x, 1, keep_dims=True) / SIZE * scale * scale * scale
    tl.store(out_ptr + first * SIZE + row * SIZE + column, (scale * grad - x * slope).to(kind), mask=inside)


def rms_norm(x: Tensor, weight_H: Tensor, eps: float, form: Form = LLAMA) -> Tensor:
    """RMSNorm of x [..., H] in 16 bits with a frozen weight of the same type: it gets no gradient."""
    if torch.is_grad_enabled() and x.requires_grad:
        return _Norm.apply(x, weight_H, eps, form)  # type: ignore[no-untyped-call,no-any-return]
    return _forward(x, None, weight_H, eps, form, keeps=False)[1]


def add_and_norm(x: Tensor, delta: Tensor, weight_H: Tensor, eps: float, form: Form = LLAMA) -> tuple[Tensor, Tensor]:
    """x + delta, rounded, and its RMSNorm, [..., H] each; without gradient."""
    total, out, _ = _forward(x, delta, weight_H, eps, form, keeps=False)
    assert total is not None
    return total, out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float, form: Form) -> Tensor:
        _, out, scale_N = _forward(x, None, weight_H, eps, form, keeps=True)
        ctx.save_for_backward(x, scale_N, weight_H)
        ctx.form = form
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale_N, weight_H = ctx.saved_tensors
        x_NH, grad_NH = in_rows(x), in_rows(grad)
        out = x.new_empty(x.shape)
        grid, sizes, warps = _tiles(x_NH)
        if x.numel():
            norm_backward[grid](
                *(grad_NH, x_NH, scale_N, weight_H, out, len(x_NH), grad_NH.stride(0), x_NH.stride(0)),
                **sizes,
                ROUNDS=ctx.form.rounds,
                OFFSET=ctx.form.offset,
                num_warps=warps,
                enable_fp_fusion=False,
            )
        return out, None, None, None


def _forward(
    x: Tensor, delta: Tensor | None, weight_H: Tensor, eps: float, form: Form, keeps: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """The sum with `delta`, the norm, and with `keeps` the float32 [N] that x was multiplied with."""
    x_NH = in_rows(x)
    delta_NH = x_NH if delta is None else in_rows(delta)
    out = x.new_empty(x.shape)
    total = None if delta is None else x.new_empty(x.shape)
    scale_N = x.new_empty(len(x_NH), dtype=torch.float32) if keeps else None
    grid, sizes, warps = _tiles(x_NH)
    if x.numel():
        norm_forward[grid](
            *(x_NH, delta_NH, weight_H, out if total is None else total, out, out if scale_N is None else scale_N),
            *(len(x_NH), x_NH.stride(0), delta_NH.stride(0), eps),
            **sizes,
            ADDS=delta is not None,
            KEEPS=keeps,
            ROUNDS=form.rounds,
            OFFSET=form.offset,
            num_warps=warps,
            enable_fp_fusion=False,
        )
    return total, out, scale_N


def _tiles(x_NH: Tensor) -> tuple[tuple[int], dict[str, int], int]:
    """Grid, constants and warps."""
    count, size = x_NH.shape
    block = triton.next_power_of_2(size)
    rows = max(1, TILE // block)
    return (
        (triton.cdiv(count, rows),),
        {"SIZE": size, "BLOCK": block, "ROWS": rows},
        max(4, min(16, rows * block // 512)),
    )


def in_rows(x: Tensor) -> Tensor:
    """[..., H] as [N, H], each row in one piece."""
    flat = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()
