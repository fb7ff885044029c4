"""What is checked of the adapter's addition on a GPU, as a function of the device, so that a CPU runs it, too."""

from collections.abc import Sequence

import torch
from torch import Tensor

SHAPES = (((4096, 1024, 1024), 32), ((4096,), 128), ((14336, 14336), 32), ((896, 128, 128), 24), ((100, 72), 4))
"""Outputs of layers that read one input, and the adapter's rank."""
BEHIND = 64
"""Numbers of a row that are nobody's."""


@torch.inference_mode()
def it_is_as_exact_as_one_addition_for_each_layer(
    device: str, dtype: torch.dtype, sizes: Sequence[int], rank: int, all_rows: Sequence[int]
) -> dict[int, float]:
    """By rows: the share of numbers that are rounded otherwise. Equal calls give equal bits, and so do graphs."""
    from dppo_cli.kernels.fused.adapter_up import add_up

    generator, shares = torch.Generator().manual_seed(0), {}
    outputs, scaling = sum(sizes), [2.0, 0.5, 1.0][: len(sizes)]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    b_Or = random(outputs, rank)
    for rows in all_rows:
        given = random(rows, outputs + rank * len(sizes) + BEHIND)
        found, again, plain = given.clone(), given.clone(), given.clone()
        add_up(found, b_Or, sizes, scaling)
        if device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                add_up(again, b_Or, sizes, scaling)
            graph.replay()
        else:
            add_up(again, b_Or, sizes, scaling)
        assert torch.equal(found, again)
        assert torch.equal(found[:, outputs:], given[:, outputs:])
        parts = [*sizes, *[rank] * len(sizes), BEHIND]
        ours, ones, exact = (of.split(parts, dim=1) for of in (found, plain, given.double()))
        other = 0
        for i, (b, s) in enumerate(zip(b_Or.split(list(sizes)), scaling, strict=True)):
            ones[i].addmm_(ones[len(sizes) + i], b.t(), alpha=s)
            right = exact[i] + s * (exact[len(sizes) + i] @ b.double().t())
            error, own = (float((of[i].double() - right).abs().mean()) for of in (ours, ones))
            assert error <= 1.02 * own, f"{rows} rows: mean error {error:.3g}, of plain operations {own:.3g}"
            other += int((ours[i] != ones[i]).sum())
        shares[rows] = other / (rows * outputs)
    return shares
