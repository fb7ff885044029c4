"""The K largest values of long rows on a CPU. Shapes: N rows, V columns, K values."""

import torch
from torch import Tensor

BLOCK = 256
"""Columns in a block. Smaller blocks give more maxima to search, larger blocks more columns."""


def top_k(values_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values of each row, in descending order, and their columns: [N, k] and int64 [N, k]; V if k > V.

    The k largest values are in the k blocks of columns with the largest maxima. Proof: if one of them were in another
    block, each of these k blocks would contain a value at least as large. So one pass over the row and a search in k
    blocks are enough; torch.topk needs several passes.
    """
    n, v = values_NV.shape
    blocks = v // BLOCK
    if blocks < 2 * k:
        top = values_NV.topk(min(k, v), dim=-1)
        return top.values, top.indices
    split = blocks * BLOCK
    blocks_NBW = values_NV[:, :split].unflatten(-1, (blocks, BLOCK))
    best_Nk1 = blocks_NBW.amax(-1).topk(k, dim=-1).indices[..., None]
    column = torch.arange(v, device=values_NV.device)
    inside_NkW = best_Nk1 * BLOCK + column[:BLOCK]
    # The columns after the last whole block are always searched.
    columns_NC = torch.cat([inside_NkW.flatten(1), column[split:].expand(n, -1)], dim=-1)
    top = values_NV.gather(-1, columns_NC).topk(k, dim=-1)
    return top.values, columns_NC.gather(-1, top.indices)
