"""Runs that end before their last step because they are good or long enough."""

from pathlib import Path

import pytest
from helpers import read_json, read_lines, train

from dppo_cli.cli.main import main

WORDS = ("reward.path=rewards.py:even", "optim.lr=0.02", "eval.success_reward=0.1", "steps=8", "run_dir=run")


def test_a_run_ends_when_it_has_taken_long_enough(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, *WORDS, "stop.seconds=0.001") == 0
    assert "warning: after step 0: stop.seconds=0.001 are over" in capsys.readouterr().out
    summary = read_json(work / "run/summary.json")
    assert (summary["steps"], summary["interrupted"]) == (0, False)
    assert summary["eval_after"] == summary["eval_before"] is not None
    # More time: it goes on, and needs no other word.
    assert main(["train", "resume=run", "stop.seconds=3600"]) == 0
    assert read_json(work / "run/summary.json")["steps"] == 8


def test_a_run_ends_when_it_is_good_enough(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, *WORDS, "eval.every=1", "stop.accuracy=0.25") == 0
    rows = read_lines(work / "run/metrics.jsonl")
    assert 0 < len(rows) < 8
    assert [row["eval_accuracy"] >= 0.25 for row in rows] == [False] * (len(rows) - 1) + [True]
    assert f"warning: after step {len(rows)}: stop.accuracy=0.25 is reached" in capsys.readouterr().out
    # It is finished: a scheduler that starts it again changes nothing.
    before = (work / "run/adapter/adapter_model.safetensors").read_bytes()
    assert train(model, *WORDS, "eval.every=1", "stop.accuracy=0.25", "resume=auto") == 0
    assert len(read_lines(work / "run/metrics.jsonl")) == len(rows)
    assert (work / "run/adapter/adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stop.accuracy=0.5"], "stop.accuracy=0.5 needs evaluations in between; set eval.every=10"),
        (["stop.accuracy=2", "eval.every=1"], "stop.accuracy=2.0 breaks the rule 0 < accuracy <= 1 or null"),
        (["stop.seconds=0"], "stop.seconds=0.0 breaks the rule seconds > 0 or null"),
        (["sampling.stop=[a,'']"], "sampling.stop=['a', ''] breaks the rule stop holds no empty text"),
        (["prompt.template_kwargs.x=1"], "prompt.template_kwargs is set, but prompt.template=plain has no template"),
        (["prompt.template=chat", "prompt.template_kwargs.tokenize=false"], "template_kwargs.tokenize is set by dppo"),
    ],
)
def test_what_cannot_be(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str], words: list[str], says: str
) -> None:
    assert train(model, *words) == 2
    assert says in capsys.readouterr().err
