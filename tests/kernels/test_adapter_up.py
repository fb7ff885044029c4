"""The addition of s B A x for several layers in one launch, against float64."""

import interpreted
import pytest
import torch
from compiled import taken
from four_bit_layers import random
from torch import Tensor

adapter_up = interpreted.kernels("adapter_up")
HALVES = (torch.bfloat16, torch.float16)
SCALING = (2.0, 0.25, 1.5)


def added(out: Tensor, b_Or: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """The outputs, rounded once."""
    outputs, rank = sum(sizes), b_Or.shape[1]
    base, *lows = out.double().split([outputs, *[rank] * len(sizes), out.shape[-1] - outputs - rank * len(sizes)], -1)
    parts = zip(lows, b_Or.double().split(sizes), SCALING, strict=False)
    return (base + torch.cat([s * (low @ b.t()) for low, b, s in parts], dim=-1)).to(out.dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("sizes", "rank", "rest", "rows"),
    [
        ((64,), 16, 48, (5, 1)),
        ((128, 64), 32, 0, (2, 9)),
        ((72, 10, 3), 4, 52, (1,)),
        ((10, 130), 8, 48, (17, 1)),
        ((64, 64, 64), 24, 56, (33, 2)),
        ((96,), 128, 0, (3,)),
        ((8,), 16, 0, (0, 1)),
    ],
    ids=str,
)
def test_outputs_are_those_of_float64_rounded(sizes, rank, rest, rows, dtype):
    outputs = sum(sizes)
    out = random(*rows, outputs + rank * len(sizes) + rest).to(dtype)
    b_Or = random(outputs, rank, seed=1).to(dtype)
    right, behind = added(out, b_Or, sizes), out[..., outputs:].clone()
    if out.numel():
        changes = (right - out[..., :outputs]).split(sizes, dim=-1)
        assert all(float(change.abs().max()) > 0.5 for change in changes), "every layer's adapter has an effect"
    adapter_up.add_up(out, b_Or, sizes, SCALING[: len(sizes)])
    found = out[..., :outputs]
    # Sums in another order may be rounded to the neighbour, and few are.
    torch.testing.assert_close(found, right, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert int((found != right).sum()) <= found.numel() // 100
    assert torch.equal(out[..., outputs:], behind)


def test_it_rounds_as_plain_operations_do():
    """One layer, but for sums in another order."""
    out, b_Or = random(7, 96 + 16).bfloat16(), random(96, 16, seed=1).bfloat16()
    plain = out[:, :96].float().addmm(out[:, 96:].float(), b_Or.float().t(), alpha=2.0).bfloat16()
    adapter_up.add_up(out, b_Or, [96], [2.0])
    assert int((out[:, :96] != plain).sum()) <= 2


@pytest.mark.parametrize("dtype", HALVES)
def test_the_probe_finds_it_right_and_what_is_wrong(dtype, monkeypatch):
    assert adapter_up.difference(torch.device("cpu"), dtype) < 2**-8
    add_up = adapter_up.add_up
    monkeypatch.setattr(
        adapter_up, "add_up", lambda out, b, sizes, scaling: add_up(out, b, sizes, [1.1 * s for s in scaling])
    )
    assert adapter_up.difference(torch.device("cpu"), dtype) > adapter_up.CLOSE


def test_compiled_for_gpus():
    """Nothing spills, and for few rows all programs of Llama's widest layers run at once."""
    found = taken("specimens_adapter_up")
    assert len(found) == 7
    for name, of in found.items():
        for capability, kilobytes in (("80", 164), ("90", 228)):
            usage = of[capability]
            at_once = 4 if name.endswith("16 rows") else 3
            assert usage["spilled"] == 0, (name, of)
            assert at_once * 128 * usage["registers"] <= 65536, (name, of)
            assert at_once * (usage["shared"] + 1024) <= kilobytes * 1024, (name, of)
