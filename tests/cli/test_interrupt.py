"""Ctrl-C: what was learnt is kept, and one line says where."""

from pathlib import Path
from typing import Any

import pytest
from helpers import read_json, read_lines, train
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dppo_cli.rollout.local import LocalEngine
from dppo_cli.training.learner import Learner

pytestmark = pytest.mark.usefixtures("work")


NOTHING = "dppo: stopped: no step was finished; nothing is saved\n"


def interrupt_at(call: int, owner: type, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the `call`th call of a method."""
    real, calls = getattr(owner, method), []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(owner, method, interrupted)


def test_ctrl_c_saves_the_last_finished_step(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, "steps=2", "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(4, LocalEngine, "generate", patch)  # The first evaluation, step 1, step 2, step 3.
        assert train(model, "steps=5", "run_dir=cut") == 130
    assert capsys.readouterr().err == (
        "dppo: stopped: the state after step 2 is saved; to go on: dppo train resume=cut\n"
    )
    summary = read_json(work / "cut/summary.json")
    assert (summary["steps"], summary["interrupted"], summary["eval_after"]) == (2, True, None)
    assert len(read_lines(work / "cut/metrics.jsonl")) == 2
    # What was saved is what a run of two steps saves, and opens.
    for weights in ("adapter", "checkpoints/step-2/adapter"):
        whole, cut = (work / run / weights / "adapter_model.safetensors" for run in ("whole", "cut"))
        assert cut.read_bytes() == whole.read_bytes()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(work / "cut/adapter"))


@pytest.mark.parametrize(("owner", "method"), [(LocalEngine, "generate"), (Learner, "update")])
def test_ctrl_c_before_the_first_step_leaves_nothing(
    owner: type,
    method: str,
    model: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt_at(1, owner, method, monkeypatch)
    assert train(model, "run_dir=run") == 130
    assert capsys.readouterr().err == NOTHING
    assert sorted(p.name for p in work.iterdir() if p.name != "__pycache__") == ["rewards.py"]


def test_ctrl_c_while_loading_leaves_nothing(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(1, Learner, "__init__", monkeypatch)
    assert train(model, "run_dir=run") == 130
    assert capsys.readouterr().err == "dppo: interrupted\n"
    assert not (work / "run").exists()


def test_ctrl_c_ends_a_sweep(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    interrupt_at(4, Learner, "update", monkeypatch)
    assert train(model, "-m", "seed=1,2,3", "steps=3", "batch.prompts_per_update=2", "run_dir=sweep") == 130
    captured = capsys.readouterr()
    assert captured.err == "dppo: stopped: to go on: the same command with run_dir=sweep resume=auto\n"
    assert sorted(p.name for p in (work / "sweep").iterdir()) == ["0", "1", "multirun.yaml"]
    assert read_json(work / "sweep/0/summary.json")["steps"] == 3
    # Of the job that was interrupted there is how it ended, and no run.
    assert [p.name for p in (work / "sweep/1").iterdir()] == ["job.json"]
    record = read_json(work / "sweep/1/job.json")
    assert (record["status"], record["error"]) == (130, NOTHING.removeprefix("dppo: ").strip())
    # The table shows what there is.
    assert "seed=1" in captured.out and "failed: stopped: no step was finished" in captured.out
