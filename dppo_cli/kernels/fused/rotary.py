"""Rotary embedding (arXiv 2104.09864) of queries and keys in one kernel, with RMSNorm of each head before it if wanted.

A pair (a, b), half of D apart, becomes (a cos - b sin, b cos + a sin). Both products are rounded, and then their sum,
as in transformers; with angles in float32 (OLMo 2) the sum alone is. Backward it is the rotation by the negative angle.
The two halves of cos and of sin are equal, as transformers makes them; the first is read. The rest of a head that is
larger than D stays as it is (Phi-3).

Shapes: B sequences, Q and K heads, T positions, D numbers of a head that are rotated.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_cli.kernels.fused.norm import LLAMA, Form

TILE = 4096
"""Numbers of a program."""


@triton.jit
def _rotate(
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    block,
    positions,
    head_stride,
    position_stride,
    cos_stride,
    sin_stride,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_ROUNDS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS: tl.constexpr,
    BACK: tl.constexpr,
):
    """Rows of one sequence: the heads of its first position, of its second, and so on."""
    row = block * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None]
    inside = (row < positions * HEADS) & (column < HALF)
    position, head = row // HEADS, row % HEADS
    kind = out_ptr.dtype.element_ty
    at = x_ptr + position * position_stride + head * head_stride + column
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + position * cos_stride + column, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * sin_stride + column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        weight_a = tl.load(weight_ptr + column, mask=column < HALF, other=0.0).to(tl.float32) + OFFSET
        weight_b = tl.load(weight_ptr + HALF + column, mask=column < HALF, other=0.0).to(tl.float32) + OFFSET
        scale = tl.rsqrt(tl.sum(a * a + b * b, 1, keep_dims=True) / (2 * HALF) + eps)
        a, b = a * scale, b * scale
        if NORM_ROUNDS:
            a, b = a.to(kind).to(tl.float32), b.to(kind).to(tl.float32)
        a = (weight_a * a).to(kind).to(tl.float32)
        b = (weight_b * b).to(kind).to(tl.float32)
    a_cos, a_sin, b_cos, b_sin = a * cos, a * sin, b * cos, b * sin
    if ROUNDS:
        a_cos, a_sin = a_cos.to(kind).to(tl.float32), a_sin.to(kind).to(tl.float32)
        b_cos, b_sin = b_cos.to(kind).to(tl.float32), b_sin.to(kind).to(tl.float32)
    if BACK:
        first, second = a_cos + b_sin, b_cos - a_sin
    else:
        first, second = a_cos - b_sin, b_cos + a_sin
    to = out_ptr + row * (2 * HALF + REST) + column
    tl.store(to, first.to(kind), mask=inside)
    tl.store(to + HALF, second.to(kind), mask=inside)
    if REST:
        more = 2 * HALF + tl.arange(0, REST_BLOCK)[None]
        there = (row < positions * HEADS) & (more < 2 * HALF + REST)
        rest = tl.load(x_ptr + position * position_stride + head * head_stride + more, mask=there, other=0.0)
        tl.store(out_ptr + row * (2 * HALF + REST) + more, rest, mask=there)


@triton.jit
def rotate_both(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    positions,
    q_sequence_stride,
    q_head_stride,
    q_position_stride,
    k_sequence_stride,
    k_head_stride,
    k_position_stride,
    cos_sequence_stride,
    cos_position_stride,
    sin_sequence_stride,
    sin_position_stride,
    eps,
    Q: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    NORM: tl.constexpr,
    NORM_ROUNDS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS: tl.constexpr,
    BACK: tl.constexpr,
):
    block, sequence = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q_blocks = tl.cdiv(positions * Q, ROWS)
    cos_ptr += sequence * cos_sequence_stride
    sin_ptr += sequence * sin_sequence_stride
    if block < q_blocks:
        _rotate(
            q_ptr + sequence * q_sequence_stride,
            q_weight_ptr,
            cos_ptr,
            sin_ptr,
            q_out_ptr + sequence * positions * Q * (2 * HALF + REST),
            block,
            positions,
            q_head_stride,
            q_position_stride,
            cos_position_stride,
            sin_position_stride,
            eps,
            Q,
            HALF,
            REST,
            BLOCK,
            REST_BLOCK,
            ROWS,
            NORM,
            NORM_ROUNDS,
            OFFSET,
            ROUNDS,
            BACK,
        )
    else:
        _rotate(
            k_ptr + sequence * k_sequence_stride,
            k_weight_ptr,
            cos_ptr,
            sin_ptr,
            k_out_ptr + sequence * positions * K * (2 * HALF + REST),
            block - q_blocks,
            positions,
            k_head_stride,
            k_position_stride,
            cos_position_stride,
            sin_position_stride,
            eps,
            K,
            HALF,
            REST,
            BLOCK,
            REST_BLOCK,
            ROWS,
            NORM,
            NORM_ROUNDS,
            OFFSET,
            ROUNDS,
            BACK,
        )


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B, Q, T, D or more] and keys [B, K, T, D or more] in 16 bits, any strides; cos and sin [B or 1, T, D].

    What comes back has these shapes, and in memory the heads of a position beside each other.
    """
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotation.apply(q, k, cos, sin)  # type: ignore[no-untyped-call,no-any-return]
    return _rotated(q, k, cos, sin)


def norm_and_rotate(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_weight_D: Tensor,
    k_weight_D: Tensor,
    eps: float,
    form: Form = LLAMA,
) -> tuple[Tensor, Tensor]:
    """`rotate` of the RMSNorm of each head, as in Qwen 3 and Gemma 3; without gradient."""
    return _rotated(q, k, cos, sin, (q_weight_D, k_weight_D), eps, form)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotated(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return *_rotated(grad_q, grad_k, cos, sin, back=True), None, None


def _rotated(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    weights: tuple[Tensor, Tensor] | None = None,
    eps: float = 0.0,
    form: Form = LLAMA,
    back: bool = False,
) -> tuple[Tensor, Tensor]:
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    sequences, queries, positions, size = q.shape
    keys, rotated = k.shape[1], cos.shape[-1]
    assert weights is None or rotated == size
    q_out, k_out = (x.new_empty(sequences, positions, heads, size) for x, heads in ((q, queries), (k, keys)))
    if positions and sequences:
        block = triton.next_power_of_2(rotated // 2)
        rows = _rows(positions, queries, block)
        blocks = triton.cdiv(positions * queries, rows) + triton.cdiv(positions * keys, rows)
        # One row of angles may be that of all sequences.
        angles = [stride for x in (cos, sin) for stride in (x.stride(0) if len(x) > 1 else 0, x.stride(1))]
        rotate_both[blocks, sequences](
            *(q, k, *(weights or (q, k)), cos, sin, q_out, k_out, positions, *q.stride()[:3], *k.stride()[:3]),
            *angles,
            eps,
            Q=queries,
            K=keys,
            HALF=rotated // 2,
            REST=size - rotated,
            BLOCK=block,
            REST_BLOCK=triton.next_power_of_2(max(size - rotated, 1)),
            ROWS=rows,
            NORM=weights is not None,
            NORM_ROUNDS=form.rounds,
            OFFSET=form.offset,
            # Gradients of the products are rounded whatever the angles are in.
            ROUNDS=back or cos.dtype == q.dtype,
            BACK=back,
            num_warps=max(1, min(8, rows * block // 256)),
            enable_fp_fusion=False,  # which would leave one product unrounded
        )
    return q_out.transpose(1, 2), k_out.transpose(1, 2)


def _rows(positions: int, heads: int, block: int) -> int:
    """Rows of a program: several positions where there are many, one where there is one."""
    most = max(1, TILE // (2 * block))
    return most if positions > 1 else min(most, triton.next_power_of_2(heads))
