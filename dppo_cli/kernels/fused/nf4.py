"""Products with weights that stay in NF4 (arXiv 2305.14314), with the adapter beside them, in one launch.

    out = bf16(bf16(x W^T + bias) + s low B^T),  W = bf16(code * absmax)

W is what `dequantize_4bit` gives, bit for bit; it is decoded in registers, as the left factor of out^T = W x^T, so that
few rows waste little. Sums are float32. The trainer rounds low B^T and s low B^T, too.

A byte holds two weights, the higher half the first. A thread reads words of eight weights, four neighbouring threads
the words of a row. Tensor cores want weights in another order, which is as good as any, if x has the same: both the
inputs and the outputs of a tile are counted in the order in which no weight has to change its thread.

Layers that read one input, at most three, have their outputs one below the other.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence
from dataclasses import dataclass, replace

import triton
import triton.language as tl

from dppo_cli.kernels.four_bits import BLOCK


@triton.jit(do_not_specialize=["rows"])
def nf4_product(
    x_ptr,
    code_ptr,
    absmax_ptr,
    table_ptr,
    low_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    part_ptr,
    count_ptr,
    rows,
    INPUTS: tl.constexpr,
    SIZE_0: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
    OUTPUT_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    WORDS: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
):
    """A tile of outputs of one layer for a block of rows, from a part of the inputs.

    x [rows, INPUTS], low [rows, layers RANK], out [rows, all SIZEs], b [all SIZEs, RANK], bias [all SIZEs]: 16 bits.
    absmax, table [16], scale [layers]: float32. code: int32 words. part, count: room for sums and zeros if SPLITS > 1.
    """
    STEP: tl.constexpr = 32 * WORDS
    SCALES: tl.constexpr = WORDS // 2
    REPEATS: tl.constexpr = OUTPUT_BLOCK // (16 * WARPS)
    TILES_0: tl.constexpr = (SIZE_0 + OUTPUT_BLOCK - 1) // OUTPUT_BLOCK
    TILES_1: tl.constexpr = (SIZE_1 + OUTPUT_BLOCK - 1) // OUTPUT_BLOCK
    LAYERS: tl.constexpr = 3 if SIZE_2 else 2 if SIZE_1 else 1
    kind: tl.constexpr = x_ptr.dtype.element_ty
    tile, part, row_block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    layer = (tile >= TILES_0).to(tl.int32) + (tile >= TILES_0 + TILES_1).to(tl.int32)
    start = tl.where(layer == 0, 0, tl.where(layer == 1, SIZE_0, SIZE_0 + SIZE_1))
    end = tl.where(layer == 0, SIZE_0, tl.where(layer == 1, SIZE_0 + SIZE_1, SIZE_0 + SIZE_1 + SIZE_2))
    before = tl.where(layer == 0, 0, tl.where(layer == 1, TILES_0, TILES_0 + TILES_1))
    start += (tile - before) * OUTPUT_BLOCK

    output = tl.minimum(start + tl.arange(0, OUTPUT_BLOCK), end - 1)[:, None]
    word = output * (INPUTS // 8) + tl.arange(0, 4 * WORDS)[None]
    block = output * (INPUTS // 64) + tl.arange(0, SCALES)[None]
    row = row_block * ROW_BLOCK + tl.arange(0, ROW_BLOCK)
    there = tl.arange(0, ROW_BLOCK) if FULL else tl.minimum(row, rows - 1) - row_block * ROW_BLOCK
    # Which input the tile's i-th is: a thread has 8 WORDS of a row, and gives NEAR of them after each other.
    NEAR: tl.constexpr = 4 if WIDE else 2
    i = tl.arange(0, STEP)
    i = i // NEAR % 4 * (8 * WORDS) + i // (4 * NEAR) * NEAR + i % NEAR
    column = there[None] * INPUTS + i[:, None]
    # Every lane of a warp has a code of the table, so that a look-up is a shuffle.
    table = tl.load(table_ptr + tl.arange(0, 32) % 16)
    table = tl.broadcast_to(table[None], [OUTPUT_BLOCK * WORDS // 8, 32])

    acc = tl.zeros([OUTPUT_BLOCK, ROW_BLOCK], tl.float32)
    LENGTH: tl.constexpr = INPUTS // SPLITS
    code_ptr += part * (LENGTH // 8)
    absmax_ptr += part * (LENGTH // 64)
    x_ptr += part * LENGTH + row_block * (ROW_BLOCK * INPUTS)
    for k in tl.range(0, LENGTH, STEP, num_stages=STAGES):
        words = _in_lanes(tl.load(code_ptr + k // 8 + word), WARPS, WORDS)
        scale = tl.load(absmax_ptr + k // 64 + block)[:, :, None]
        scale = tl.broadcast_to(scale, [OUTPUT_BLOCK, SCALES, 4 * WORDS // SCALES])
        scale = _in_lanes(scale, WARPS, WORDS)
        w0, w1 = _decoded(table, words, scale, 4), _decoded(table, words, scale, 0)
        w2, w3 = _decoded(table, words, scale, 12), _decoded(table, words, scale, 8)
        w4, w5 = _decoded(table, words, scale, 20), _decoded(table, words, scale, 16)
        w6, w7 = _decoded(table, words, scale, 28), _decoded(table, words, scale, 24)
        even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
        weight = tl.join(even, tl.join(tl.join(w1, w5), tl.join(w3, w7))).to(kind)
        # Dimensions: repeats, 2 x 8 outputs of a warp; words, pairs (4 and 2 apart) and halves of inputs.
        weight = tl.reshape(weight, [REPEATS, 2, WORDS, WARPS, 8, 4, 2, 2, 2])
        if WIDE:
            weight = tl.permute(weight, [0, 3, 1, 4, 2, 6, 5, 7, 8])
        else:
            weight = tl.permute(weight, [0, 3, 1, 4, 2, 6, 7, 5, 8])
        weight = tl.reshape(weight, [OUTPUT_BLOCK, STEP])
        acc = tl.dot(weight, tl.load(x_ptr + k + column), acc)

    m = tl.arange(0, OUTPUT_BLOCK)
    output = start + m // (16 * WARPS) * (16 * WARPS) + m // 8 % 2 * (8 * WARPS) + m % (16 * WARPS) // 16 * 8 + m % 8
    if SPLITS == 1:
        _finish(
            *(acc, low_ptr, b_ptr, scale_ptr, bias_ptr, out_ptr, output, end, row, rows, layer),
            *(SIZE_0 + SIZE_1 + SIZE_2, LAYERS, RANK, BIAS),
        )
    else:
        # The program that comes last adds all parts, in their order.
        place = row_block * tl.num_programs(0) + tile
        size: tl.constexpr = OUTPUT_BLOCK * ROW_BLOCK
        at = m[:, None] * ROW_BLOCK + tl.arange(0, ROW_BLOCK)[None]
        part_ptr += place.to(tl.int64) * (SPLITS * size)
        tl.store(part_ptr + part * size + at, acc)
        tl.debug_barrier()
        if tl.atomic_add(count_ptr + place, 1) == SPLITS - 1:
            acc = tl.load(part_ptr + at, cache_modifier=".cg")
            for _ in range(1, SPLITS):
                part_ptr += size
                acc += tl.load(part_ptr + at, cache_modifier=".cg")
            tl.store(count_ptr + place, 0)
            _finish(
                *(acc, low_ptr, b_ptr, scale_ptr, bias_ptr, out_ptr, output, end, row, rows, layer),
                *(SIZE_0 + SIZE_1 + SIZE_2, LAYERS, RANK, BIAS),
            )


@triton.jit
def _in_lanes(x, WARPS: tl.constexpr, WORDS: tl.constexpr):
    """[outputs, 4 WORDS]: what a warp's lanes hold at once, 8 outputs of 4 threads each, side by side."""
    x = tl.reshape(x, [x.numel // (32 * WARPS * WORDS), WARPS, 8, 4, WORDS])
    return tl.reshape(tl.permute(x, [0, 4, 1, 2, 3]), [x.numel // 32, 32])


@triton.jit
def _decoded(table, words, scale, SHIFT: tl.constexpr):
    return tl.gather(table, (words >> SHIFT) & 15, 1) * scale


@triton.jit
def _finish(
    acc,
    low_ptr,
    b_ptr,
    scale_ptr,
    bias_ptr,
    out_ptr,
    output,
    end,
    row,
    rows,
    layer,
    OUTPUTS: tl.constexpr,
    LAYERS: tl.constexpr,
    RANK: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Bias and adapter."""
    kind: tl.constexpr = out_ptr.dtype.element_ty
    inside, real = (output < end)[:, None], (row < rows)[None]
    if BIAS:
        acc += tl.load(bias_ptr + output, mask=output < end, other=0.0).to(tl.float32)[:, None]
    beside = tl.zeros_like(acc)
    RANKS: tl.constexpr = 16 if RANK <= 16 else 32 if RANK <= 32 else 64
    for first in tl.static_range(0, RANK, RANKS):
        j = first + tl.arange(0, RANKS)
        b = tl.load(b_ptr + output[:, None] * RANK + j[None], mask=inside & (j < RANK)[None], other=0.0)
        at = low_ptr + row[None] * (LAYERS * RANK) + layer * RANK + j[:, None]
        low = tl.load(at, mask=(j < RANK)[:, None] & real, other=0.0)
        beside = tl.dot(b, low, beside)
    out = acc.to(kind).to(tl.float32) + tl.load(scale_ptr + layer) * beside
    tl.store(out_ptr + row[None] * OUTPUTS + output[:, None], out.to(kind), mask=inside & real)


FEW = 8
"""Rows of the smallest tile. Triton multiplies it by the older tensor-core instructions, on Hopper, too, which leave
registers for twice as many programs at once."""


@dataclass(frozen=True)
class Tiling:
    """How a launch is cut: outputs and rows of a tile, parts of the inputs, and a program's warps and loads ahead."""

    outputs: int = 128
    rows: int = 16
    splits: int = 1
    warps: int = 4
    stages: int = 2


def choose(sizes: Sequence[int], inputs: int, rows: int, processors: int, wide: bool) -> Tiling:
    """By the number of steps that the busiest multiprocessor makes.

    A program takes as long as two steps to begin and end, and adding the parts up as long as reading them. Fewer
    programs at once than a multiprocessor needs to hide what it waits for leave it idle; with few rows, and three loads
    ahead, hardly more than one are enough. `wide`, cards other than Hopper's: they may have 99 KiB of shared memory,
    and 8 warps share the decoding of more than 32 rows.
    """
    most = 64 if wide else 128
    row_block = min(most, max(FEW, triton.next_power_of_2(rows)))
    crowded = row_block == most
    base = Tiling(rows=row_block, warps=8 if crowded else 4, stages=3 if row_block == FEW else 2)
    tiles = sum(-(-size // base.outputs) for size in sizes) * -(-rows // row_block)
    needed = 1.3 if row_block == FEW else min(3, most // row_block)
    steps = inputs // (32 * words_of(inputs))

    def cost(splits: int) -> float:
        added = 0.0 if splits == 1 else 1.4 * row_block / 16
        programs: float = max(needed, -(-tiles * splits // processors))
        return programs * (steps // splits + 2 + added)

    # Parts of one step each, which are no loop, gave wrong sums on an H100 (Triton 3.6), and alone they did not.
    parts = [n for n in range(1, 17) if steps % n == 0 and (n == 1 or steps // n > 1)]
    return replace(base, splits=min(parts, key=cost))


def words_of(inputs: int) -> int:
    """Of a row, for each of four threads."""
    return 4 if inputs % (2 * BLOCK) == 0 else 2
