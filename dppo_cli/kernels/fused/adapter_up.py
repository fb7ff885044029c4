"""s B A x added to the outputs of layers that read one input, in one launch and in place.

    out = bf16(out + s low B^T)

Sums are float32 and rounded once. The low-rank activations, low = A x, lie behind the outputs in the same rows, where a
product with the weights and A, one below the other, leaves them.

Shapes: R rows, O outputs of a layer, r rank, W the width of a row.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dppo_cli.kernels.probe import apart

MOST_LAYERS = 3
"""That read one input."""
MOST_RANK = 128
"""A program holds all columns of its B at once."""
OUTPUT_BLOCK = 64
MOST_ROWS = 64
"""Rows of a program."""
CLOSE = 2**-6
"""Of numbers near 1 in bfloat16, whose sums were rounded in another order."""


@triton.jit
def adapter_up(
    out_ptr,
    b_ptr,
    rows,
    stride,
    scale_0,
    scale_1,
    scale_2,
    SIZE_0: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    OUTPUT_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    """A tile of outputs of one layer for a block of rows.

    out [rows, all SIZEs and RANK for each layer and what follows], `stride` apart, and b [all SIZEs, RANK]: 16 bits.
    """
    TILES_0: tl.constexpr = (SIZE_0 + OUTPUT_BLOCK - 1) // OUTPUT_BLOCK
    TILES_1: tl.constexpr = (SIZE_1 + OUTPUT_BLOCK - 1) // OUTPUT_BLOCK
    SIZES: tl.constexpr = SIZE_0 + SIZE_1 + SIZE_2
    # Without a mask memory is read in wider pieces.
    FULL: tl.constexpr = SIZE_0 % OUTPUT_BLOCK + SIZE_1 % OUTPUT_BLOCK + SIZE_2 % OUTPUT_BLOCK == 0
    kind: tl.constexpr = out_ptr.dtype.element_ty
    tile, row_block = tl.program_id(0), tl.program_id(1)
    layer = (tile >= TILES_0).to(tl.int32) + (tile >= TILES_0 + TILES_1).to(tl.int32)
    start = tl.where(layer == 0, 0, tl.where(layer == 1, SIZE_0, SIZE_0 + SIZE_1))
    end = tl.where(layer == 0, SIZE_0, tl.where(layer == 1, SIZE_0 + SIZE_1, SIZES))
    before = tl.where(layer == 0, 0, tl.where(layer == 1, TILES_0, TILES_0 + TILES_1))
    scale = tl.where(layer == 0, scale_0, tl.where(layer == 1, scale_1, scale_2))

    out_ptr += row_block.to(tl.int64) * ROW_BLOCK * stride
    row = tl.arange(0, ROW_BLOCK)[:, None]
    output = start + (tile - before) * OUTPUT_BLOCK + tl.arange(0, OUTPUT_BLOCK)[None]
    j = tl.arange(0, RANKS)
    real = row < rows - row_block * ROW_BLOCK
    inside = real if FULL else real & (output < end)
    known = j < RANK
    if FULL and RANK == RANKS:
        b = tl.load(b_ptr + output * RANK + j[:, None])
    else:
        b = tl.load(b_ptr + output * RANK + j[:, None], mask=(output < end) & known[:, None], other=0.0)
    low = tl.load(out_ptr + row * stride + (SIZES + layer * RANK) + j[None], mask=real & known[None], other=0.0)
    at = out_ptr + row * stride + output
    out = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, (out + scale * tl.dot(low, b)).to(kind), mask=inside)


def add_up(out: Tensor, b_Or: Tensor, sizes: Sequence[int], scaling: Sequence[float]) -> None:
    """Adds s low B^T to `out` [..., W] in 16 bits: outputs of layers of these `sizes`, the low of each, and any rest.

    `b_Or`: the B of all layers, at most `MOST_LAYERS` of rank up to `MOST_RANK`, one below the other; `scaling`: each
    one's s.
    """
    out_RW, rank = out.view(-1, out.shape[-1]), b_Or.shape[1]
    rows = len(out_RW)
    row_block = min(MOST_ROWS, max(16, triton.next_power_of_2(rows)))
    tiles = sum(triton.cdiv(size, OUTPUT_BLOCK) for size in sizes)
    if rows:
        adapter_up[tiles, triton.cdiv(rows, row_block)](
            *(out_RW, b_Or, rows, out_RW.stride(0), *scaling, *[0.0] * (MOST_LAYERS - len(scaling))),
            **dict(zip(("SIZE_0", "SIZE_1", "SIZE_2"), (*sizes, 0, 0), strict=False)),
            RANK=rank,
            RANKS=max(16, triton.next_power_of_2(rank)),
            OUTPUT_BLOCK=OUTPUT_BLOCK,
            ROW_BLOCK=row_block,
            num_warps=4,
        )


def difference(device: torch.device, dtype: torch.dtype) -> float:
    """The largest, relative to the largest output, from sums in float64, for full tiles and others."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    pairs = []
    for sizes, rank, rows in (((192, 64), 32, 70), ((72, 64, 8), 24, 5)):
        scaling = [2.0, 0.5, 1.0][: len(sizes)]
        outputs, ranks = sum(sizes), rank * len(sizes)
        out, b_Or = random(rows, outputs + ranks), random(outputs, rank)
        base, lows = out.double()[:, :outputs], out.double()[:, outputs:].split(rank, dim=1)
        parts = zip(lows, b_Or.double().split(sizes), scaling, strict=True)
        expected = base + torch.cat([s * (low @ b.t()) for low, b, s in parts], dim=1)
        add_up(out, b_Or, sizes, scaling)
        pairs.append((out[:, :outputs], expected))
    return apart(pairs)
