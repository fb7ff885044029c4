"""The K largest by blocks, against a sort of the whole row."""

import pytest
import torch

from dppo_cli.kernels.top_k import BLOCK, top_k


@pytest.mark.parametrize("columns", [3, 6 * BLOCK, 6 * BLOCK + 1, 40 * BLOCK + 77])
@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("kind", ["random", "ties", "sorted", "last", "forbidden"])
def test_top_k_is_what_sorting_finds(columns, k, kind):
    values = torch.randn(5, columns, generator=torch.Generator().manual_seed(k))
    if kind == "ties":
        values = values.round()
    elif kind == "sorted":
        values = values.sort(-1).values
    elif kind == "last":
        values[:, -2:] += 20
    elif kind == "forbidden":
        values[:, 2:] = -torch.inf
    found, ids = top_k(values, k)
    assert torch.equal(found, values.sort(-1, descending=True).values[:, :k])
    assert torch.equal(values.gather(-1, ids), found)
    assert all(len(set(row)) == min(k, columns) for row in ids.tolist())
