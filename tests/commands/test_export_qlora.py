"""Exports of runs on a 4-bit base."""

from pathlib import Path

import pytest
import torch
from exports import base_logits, difference
from helpers import train
from safetensors.torch import load_file

from dppo_cli.cli.main import main


def test_a_merge_after_qlora_starts_from_the_unquantised_base(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapter=qlora", "steps=2", "optim.lr=0.01", "run_dir=run"]
    assert train(model, *words) == 0
    capsys.readouterr()
    assert main(["export", "run=run", "format=merged", "out=mine"]) == 0
    output = capsys.readouterr().out
    # The policy ran on a rounded base, so the two differ by the rounding, and the user is told.
    assert 1e-3 < difference(output) < 20
    assert "trained on a nf4 base, and this merge uses the unquantised one" in output
    base, merged = load_file(model / "model.safetensors"), load_file(work / "mine/model.safetensors")
    adapter = load_file(work / "run/adapter/adapter_model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 8 / 4 * b @ a, atol=1e-6)
    assert torch.isfinite(base_logits(work / "mine")).all()


def test_the_adapter_of_a_qlora_run_is_exported_as_it_is(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, "adapter=qlora", "steps=1", "run_dir=run") == 0
    capsys.readouterr()
    assert main(["export", "run=run"]) == 0
    assert difference(capsys.readouterr().out) == 0.0
    assert (work / "run/export-adapter/adapter_model.safetensors").is_file()
