"""What an export says it is: how far from the trained policy, and how accurate."""

import re
from pathlib import Path

import pytest
import torch
from exports import figure
from helpers import read_json, train
from safetensors.torch import load_file

from dppo_cli.cli.main import main


def test_what_a_merge_after_qlora_costs(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Into the 4-bit weights it is the policy that was trained; into the original ones it is another."""
    assert train(model, "adapter=qlora", "steps=2", "optim.lr=0.01", "run_dir=run") == 0
    capsys.readouterr()
    assert main(["export", "run=run", "format=merged", "base=dequantized", "out=same"]) == 0
    same = capsys.readouterr().out
    assert main(["export", "run=run", "format=merged", "out=other"]) == 0
    other = capsys.readouterr().out
    assert abs(figure(same, "mean KL, TV")) < 1e-6 and figure(same, "largest logit difference") < 1e-3
    assert figure(other, "mean KL, TV") > 1e-3
    assert "base=dequantized keeps the trained one" in other and "base=dequantized" not in same
    base, merged = load_file(model / "model.safetensors"), load_file(work / "same/model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    assert (base[name] - merged[name]).abs().max() > 0.02, "rounded to 4 bits"
    assert torch.equal(base["lm_head.weight"], merged["lm_head.weight"])


def test_the_accuracy_of_an_export(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reward.path=rewards.py:even", "eval.success_reward=0.25", "optim.lr=0.02", "data.eval_problems=20"]
    assert train(model, *words, "steps=3", "run_dir=run") == 0
    after = read_json(work / "run/summary.json")["eval_after"]
    capsys.readouterr()
    for form in ("adapter", "merged"):
        assert main(["export", "run=run", f"format={form}", "check=accuracy", f"out={form}"]) == 0
        output = capsys.readouterr().out
        for which in ("trained", "exported"):
            match = re.search(rf"accuracy, {which}\s*│\s*([.\d]+)% ± ([.\d]+)%", output)
            assert match and float(match[1]) == pytest.approx(100 * after, abs=0.06), output
    assert 0 < after < 1


def test_the_accuracy_is_sampled_as_the_user_says(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["reward.path=rewards.py:even", "eval.success_reward=0.25", "data.eval_problems=20"]
    assert train(model, *words, "steps=1", "run_dir=run") == 0
    assert main(["eval", "run=run", "sampling.temperature=0", "out=greedy"]) == 0
    expected = read_json(work / "greedy/summary.json")["accuracy"]
    assert expected != read_json(work / "run/summary.json")["eval_after"]
    capsys.readouterr()
    assert main(["export", "run=run", "check=accuracy", "sampling.temperature=0", "out=mine"]) == 0
    match = re.search(r"accuracy, exported\s*│\s*([.\d]+)%", capsys.readouterr().out)
    assert match and float(match[1]) == pytest.approx(100 * expected, abs=0.06)
