"""The decoding steps of the GPU benchmark on a CPU, with tiny shapes."""

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPTS = ("gpu_decode", "gpu_steps", "gpu_model", "measure")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def measured(scripts: SimpleNamespace, step: str) -> dict[str, dict]:
    bench = scripts.gpu_steps.Bench(scripts.gpu_model.TINY, torch.device("cpu"))
    scripts.gpu_decode.STEPS[step][1](bench)
    return {row["what"]: row for row in bench.rows}


@pytest.mark.parametrize(
    ("step", "kinds"),
    [
        ("static", ("graphs, 2 rows", "graphs, 4 rows")),
        ("static_topk", ("graphs, 4 rows, top-20",)),
        ("static_nf4", ("graphs, 2 rows", "graphs, 4 rows")),
        (
            "static_ways",
            ("graphs, torch's flash attention, 4 rows", "graphs, masked attention, 4 rows", "no graphs, 4 rows"),
        ),
    ],
)
def test_static_steps(scripts: SimpleNamespace, step: str, kinds: tuple[str, ...]):
    rows = measured(scripts, step)
    name = "static step, NF4 + LoRA" if step == "static_nf4" else "static step, bf16 + LoRA"
    assert list(rows) == [f"{name}, {kind}" for kind in kinds]
    assert all(row["prefill_s"] > 0 and {"ms_per_step", "share_of_floor"} <= set(row) for row in rows.values())
    assert all(0 < row["share_with_prompts_once"] / row["share_of_floor"] < 1 for row in rows.values())


def test_refilled_slots(scripts: SimpleNamespace):
    """All sequences have the lengths that were asked for, in both runs."""
    local: ModuleType = importlib.import_module("dppo_cli.rollout.local")
    lengths: list[int] = []
    completion = local.completion

    def counted(policy, token_T, *of):
        lengths.append(len(token_T))
        return completion(policy, token_T, *of)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local, "completion", counted)
        rows = measured(scripts, "refill")
    names = [f"long-tailed lengths, 16 sequences in 4 slots, {kind}" for kind in ("refilled", "batch after batch")]
    assert list(rows) == names
    assert sorted(lengths[4:20]) == sorted(lengths[20:]) and len(lengths) == 36 and len(set(lengths)) > 4
    assert max(lengths) == rows[names[0]]["longest"]


def test_blocks(scripts: SimpleNamespace):
    assert list(measured(scripts, "blocks")) == [
        "looking every 1 steps, 0 ahead, 4 rows",
        "looking every 8 steps, 0 ahead, 4 rows",
        "looking every 8 steps, 1 ahead, 4 rows",
    ]


def test_long_prompts(scripts: SimpleNamespace):
    """Of two layers with two key heads of 16 numbers in float32: two prompts of 64 tokens, four samples of 4."""
    ((name, row),) = measured(scripts, "long").items()
    assert name == "long prompts, 2 x 2 samples of 64 + 4 tokens"
    position = 2 * 2 * 2 * 16 * 4 / 2**30
    assert row["slots_gib"] == pytest.approx(position * (2 * 256 + 4 * 256))
    assert row["slots_gib_unshared"] == pytest.approx(position * 4 * (256 + 256))
    assert row["prefill_s"] > 0 and "ms_per_step" in row
