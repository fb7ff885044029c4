"""The steps of the GPU benchmark about norms, gates and rotations on a CPU, with tiny shapes."""

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPTS = ("gpu_fused", "gpu_steps", "gpu_model", "measure")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in SCRIPTS})
    for name in SCRIPTS:
        sys.modules.pop(name, None)


def bench(scripts: SimpleNamespace):
    return scripts.gpu_steps.Bench(scripts.gpu_model.TINY, torch.device("cpu"))


def test_kernels(scripts: SimpleNamespace):
    if not scripts.gpu_fused.has_triton(torch.device("cpu")):
        pytest.skip("Triton is not installed")
    run = bench(scripts)
    run.bandwidth = 1e9
    scripts.gpu_fused.STEPS["kernels"][1](run)
    *both_ways, last = run.rows
    assert [row["what"] for row in both_ways] == [
        f"kernel, {name}, 8 tokens" for name in ("norm of 64", "norm of 16", "rotation", "gate")
    ]
    # Bytes of 8 tokens in bfloat16, read and written.
    for row, read, written, back in zip(
        both_ways, (64, 64, 96, 256), (64, 64, 96, 128), (192, 192, 192, 640), strict=True
    ):
        assert row["share_of_copy"] == pytest.approx(2 * 8 * (read + written) / (1e3 * row["us"]))
        assert row["backward_share"] == pytest.approx(2 * 8 * back / (1e3 * row["backward_us"]))
        assert row["plain_us"] > 0 and row["plain_backward_us"] > 0
    assert last["what"] == "kernel, sum and norm of 64, 4 rows" and last["us"] > 0 and last["plain_us"] > 0


def test_no_triton_is_said(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    run = bench(scripts)
    scripts.gpu_fused.STEPS["kernels"][1](run)
    assert [row["not_run"] for row in run.rows] == ["Triton is not installed, or has no GPU"]


def test_plain_modules_are_those_of_transformers(scripts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    layers = pytest.importorskip("dppo_cli.kernels.fused.layers")
    model = scripts.gpu_model.plain_model(scripts.gpu_model.TINY, torch.device("cpu"), torch.bfloat16)
    with scripts.gpu_fused.plain_modules(model) as changed:
        assert changed == 0
    plain = [type(m) for m in model.modules()]
    for module in model.modules():
        module.__class__ = layers.KINDS.get(type(module), type(module))
    fused = [type(m) for m in model.modules()]
    with scripts.gpu_fused.plain_modules(model) as changed:
        assert [type(m) for m in model.modules()] == plain and changed == 2 * 4 + 1
    assert [type(m) for m in model.modules()] == fused != plain


@pytest.mark.filterwarnings("ignore")
def test_an_update_with_plain_modules(scripts: SimpleNamespace):
    run = bench(scripts)
    scripts.gpu_fused.STEPS["update_plain"][1](run)
    ((row),) = run.rows
    assert row["what"] == "update, bf16 LoRA, plain modules, 2 x 2 x (8 + 8)" and row["seconds"] > 0
