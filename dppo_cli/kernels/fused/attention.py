"""Attention of one token per row to two stretches of keys, its prompt's and its own, and the writing of new ones.

Stretches are split into chunks, which are computed side by side and then summed (Flash-Decoding, Dao et al. 2023). With
scores s_j = scale q k_j of a chunk c,
    l_c = log sum_j exp(s_j),  o_c = sum_j exp(s_j - l_c) v_j,  o = sum_c exp(l_c) o_c / sum_c exp(l_c).
Weights exp(s_j - max_j s_j) are rounded to 16 bits for their product with v, as in FlashAttention-2; o_c and l_c, with
base 2 for e, are kept in float32. A key is read once for the query heads of neighbouring rows with the same prompt:
they fill the 16 rows that tensor cores multiply at least. What a row gets does not depend on the rows beside it.

Shapes: R rows, M positions of the pool, K key heads, Q query heads per key head, D head size.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_cli.kernels import flash

CLOSE = flash.CLOSE
SIZES = (64, 128, 256)
"""Of a head."""
TILE = 16
"""Query heads that a program multiplies."""
CHUNK = 128
"""Positions of a chunk, where `MOST_CHUNKS` are enough for a stretch; else a multiple."""
MOST_CHUNKS = 8


@triton.jit(do_not_specialize=("rows", "prompt_chunk", "own_chunk", "prompt_chunks", "chunks"))
def attend_to_chunks(
    q_ptr,
    keys_ptr,
    values_ptr,
    prompt_ptr,
    own_ptr,
    prompt_used_ptr,
    own_used_ptr,
    out_ptr,
    lse_ptr,
    scale,
    rows,
    prompt_chunk,
    own_chunk,
    prompt_chunks,
    chunks,
    K: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One chunk of a row, for the query heads of one key head; and for rows of its tile that read the same."""
    row, key_head, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile_M = tl.arange(0, TILE)
    GROUP: tl.constexpr = TILE // Q
    row_M = row // GROUP * GROUP + tile_M // Q
    inside_M = (tile_M < GROUP * Q) & (row_M < rows)
    if chunk < prompt_chunks:
        start, used = tl.load(prompt_ptr + row), tl.load(prompt_used_ptr + row).to(tl.int32)
        size, first = prompt_chunk, chunk * prompt_chunk
        same_M = tl.load(prompt_ptr + row_M, mask=inside_M, other=-1) == start
        same_M &= tl.load(prompt_used_ptr + row_M, mask=inside_M, other=-1) == used
    else:
        start, used = tl.load(own_ptr + row), tl.load(own_used_ptr + row).to(tl.int32)
        size, first = own_chunk, (chunk - prompt_chunks) * own_chunk
        same_M = row_M == row
    if first >= used:
        of_row = (row.to(tl.int64) * K + key_head) * Q + tile_M
        tl.store(lse_ptr + of_row * chunks + chunk, tl.full([TILE], float("-inf"), tl.float32), mask=tile_M < Q)
        return
    same_M &= inside_M
    if tl.max((same_M & (row_M < row)).to(tl.int32), 0) > 0:
        return  # The first of them computes it.

    end = tl.minimum(used, first + size)
    column_D = tl.arange(0, D)
    head_M = (row_M.to(tl.int64) * K + key_head) * Q + tile_M % Q
    q = tl.load(q_ptr + head_M[:, None] * D + column_D[None], mask=inside_M[:, None], other=0.0)
    at_ND = tl.arange(0, BLOCK)[:, None] * (K * D) + column_D[None]
    top_M = tl.full([TILE], float("-inf"), tl.float32)
    total_M = tl.zeros([TILE], tl.float32)
    out_MD = tl.zeros([TILE, D], tl.float32)
    for position in tl.range(first, end, BLOCK, num_stages=STAGES):
        seen_N = position + tl.arange(0, BLOCK) < end
        begin = ((start + position) * K + key_head) * D
        keys = tl.load(keys_ptr + begin + at_ND, mask=seen_N[:, None], other=0.0)
        values = tl.load(values_ptr + begin + at_ND, mask=seen_N[:, None], other=0.0)
        scores_MN = tl.where(seen_N[None], tl.dot(q, tl.trans(keys)) * scale, float("-inf"))
        above_M = tl.maximum(top_M, tl.max(scores_MN, 1))
        weight_MN = tl.exp2(scores_MN - above_M[:, None])
        less_M = tl.exp2(top_M - above_M)
        total_M = total_M * less_M + tl.sum(weight_MN, 1)
        out_MD = tl.dot(weight_MN.to(values.dtype), values, out_MD * less_M[:, None])
        top_M = above_M
    at_M = head_M * chunks + chunk
    tl.store(lse_ptr + at_M, top_M + tl.log2(total_M), mask=same_M)
    tl.store(out_ptr + at_M[:, None] * D + column_D[None], out_MD / total_M[:, None], mask=same_M[:, None])


@triton.jit(do_not_specialize=("chunks",))
def sum_chunks(part_ptr, lse_ptr, out_ptr, chunks, D: tl.constexpr, CHUNKS: tl.constexpr):
    """One head of one row."""
    head = tl.program_id(0).to(tl.int64)
    chunk_C, column_D = tl.arange(0, CHUNKS), tl.arange(0, D)
    lse_C = tl.load(lse_ptr + head * chunks + chunk_C, mask=chunk_C < chunks, other=float("-inf"))
    weight_C = tl.exp2(lse_C - tl.max(lse_C, 0))
    at_CD = (head * chunks + chunk_C)[:, None] * D + column_D[None]
    # The parts of chunks without positions hold anything.
    part_CD = tl.load(part_ptr + at_CD, mask=(lse_C > float("-inf"))[:, None], other=0.0)
    out_D = tl.sum(part_CD * weight_C[:, None], 0) / tl.sum(weight_C, 0)
    tl.store(out_ptr + head * D + column_D, out_D.to(out_ptr.dtype.element_ty))


@triton.jit
def write_states(
    keys_ptr,
    values_ptr,
    new_keys_ptr,
    new_values_ptr,
    at_ptr,
    key_row_stride,
    key_head_stride,
    value_row_stride,
    value_head_stride,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The keys and values of one row."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.arange(0, BLOCK)
    inside = number < K * D
    head, column = number // D, number % D
    to = tl.load(at_ptr + row) * (K * D) + number
    key = tl.load(new_keys_ptr + row * key_row_stride + head * key_head_stride + column, mask=inside)
    value = tl.load(new_values_ptr + row * value_row_stride + head * value_head_stride + column, mask=inside)
    tl.store(keys_ptr + to, key, mask=inside)
    tl.store(values_ptr + to, value, mask=inside)


class SplitAttention:
    """See `FlashOverSlots`, in whose place it is.

    `prompt_positions` and `positions`: of a prompt's stretch and of an own one, at most. Pools are contiguous.
    """

    def __init__(self, prompt_positions: int, positions: int) -> None:
        self.prompt_chunk, self.own_chunk = chunk_of(prompt_positions), chunk_of(positions)
        self.prompt_chunks = triton.cdiv(prompt_positions, self.prompt_chunk)
        self.chunks = self.prompt_chunks + triton.cdiv(positions, self.own_chunk)
        self.stretches: tuple[Tensor, ...] = ()

    def look(self, prompt_R: Tensor, own_R: Tensor, prompt_used_R: Tensor, own_used_R: Tensor) -> None:
        self.stretches = prompt_R, own_R, prompt_used_R, own_used_R

    def __call__(
        self, q_RKQD: Tensor, keys_MKD: Tensor, values_MKD: Tensor, attn_mask: Tensor | None, scale: float
    ) -> Tensor:
        """[R, K, Q, D]. `attn_mask` is not read: it says what `look` was told."""
        rows, key_heads, query_heads, size = q_RKQD.shape
        heads = rows * key_heads * query_heads
        part_ACD = q_RKQD.new_empty(heads, self.chunks, size, dtype=torch.float32)
        lse_AC = q_RKQD.new_empty(heads, self.chunks, dtype=torch.float32)
        out_RKQD = q_RKQD.new_empty(q_RKQD.shape)
        attend_to_chunks[rows, key_heads, self.chunks](
            *(q_RKQD.contiguous(), keys_MKD, values_MKD, *self.stretches, part_ACD, lse_AC, scale * math.log2(math.e)),
            *(rows, self.prompt_chunk, self.own_chunk, self.prompt_chunks, self.chunks),
            K=key_heads,
            Q=query_heads,
            D=size,
            TILE=TILE,
            **loads(size),
            num_warps=4,
        )
        padded = triton.next_power_of_2(self.chunks)
        sum_chunks[heads,](
            part_ACD, lse_AC, out_RKQD, self.chunks, D=size, CHUNKS=padded, num_warps=warps_of(padded * size)
        )
        return out_RKQD


def supports(query_heads: int, size: int) -> bool:
    """Whether a head size, and so many query heads to a key head, are what the kernels compute."""
    return size in SIZES and query_heads <= TILE


def loads(size: int) -> dict[str, int]:
    """Positions that a program multiplies at once, and stages of loading, by the size of a head.

    Both blocks of a chunk are on their way at once where shared memory, 99 KiB on some cards, has room for them.
    """
    return {"BLOCK": 64, "STAGES": 3} if size <= 128 else {"BLOCK": 32, "STAGES": 2}


def chunk_of(positions: int) -> int:
    """Positions of a chunk of a stretch; they depend on nothing else, so that a row's sums do not."""
    return CHUNK * -(-positions // (CHUNK * MOST_CHUNKS))


def warps_of(numbers: int) -> int:
    """For the sum of so many numbers: 32 of a thread."""
    return min(max(numbers // 1024, 1), 4)


def difference(
    device: torch.device, dtype: torch.dtype, key_heads: int = 8, query_heads: int = 4, size: int = 128
) -> float:
    """The largest difference from attention in float32, and infinity if keys and values are not written as they are.

    See `flash.difference`. The numbers of heads are those of Llama 3.1 8B, where there is no model to ask.
    """
    pools = torch.zeros(2, 7, key_heads, size, dtype=dtype, device=device)
    new = torch.randn(3, 3 * key_heads, 1, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    at_R = torch.tensor([6, 1, 4], device=device)
    expected = pools.clone()
    expected[:, at_R] = torch.stack(new.squeeze(2).split(key_heads, 1)[1:])  # behind queries, as if joined
    _, keys, values = new.split(key_heads, 1)
    write(pools[0], pools[1], at_R, keys, values)
    if not torch.equal(pools, expected):
        return math.inf
    attention = SplitAttention(flash.LONGEST, flash.LONGEST)
    return flash.difference(attention, device, dtype, key_heads, query_heads, size)


def write(keys_MKD: Tensor, values_MKD: Tensor, at_R: Tensor, keys_RK1D: Tensor, values_RK1D: Tensor) -> None:
    """Put a step's keys and values [R, K, 1, D] at positions int64 [R] of contiguous pools [M, K, D].

    Rows and heads may have any strides; numbers of a head are beside each other.
    """
    rows, key_heads, _, size = keys_RK1D.shape
    strides = (stride for new in (keys_RK1D, values_RK1D) for stride in new.stride()[:2])
    write_states[rows,](
        *(keys_MKD, values_MKD, keys_RK1D, values_RK1D, at_R, *strides),
        K=key_heads,
        D=size,
        BLOCK=triton.next_power_of_2(key_heads * size),
    )
