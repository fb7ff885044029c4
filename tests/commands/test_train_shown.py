"""`dppo train console=...`: what whole runs print."""

import json
from pathlib import Path

import pytest
from helpers import read_json, read_lines, train


def test_json_is_all_of_stdout(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, "console=json", "run_dir=run", "eval.every=1", "divergence.delta_high=0.9") == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = [event["event"] for event in events]
    phases = [(event["name"], event["state"]) for event in events if event["event"] == "phase"]
    loads = ("loading the reward", "loading the model", "evaluating before training", "evaluating after training")
    assert phases == [(name, state) for name in loads for state in ("begins", "ends")]
    assert [name for name in names if name not in ("phase", "warned")] == [
        "started",
        "evaluated",
        "evaluated",
        "stepped",
        "stepped",
        "evaluated",
        "finished",
    ]
    assert [e["metrics"] for e in events if e["event"] == "stepped"] == read_lines(work / "run/metrics.jsonl")
    assert any("divergence.delta_high=0.9" in e["text"] for e in events if e["event"] == "warned")
    assert events[-1]["summary"] == read_json(work / "run/summary.json")


def test_quiet_is_warnings_and_the_table(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, "console=quiet", "run_dir=run", "divergence.delta_high=0.9") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("warning: divergence.delta_high=0.9")
    assert "run folder: run" not in lines and not any(line.startswith("step ") for line in lines)
    assert any("accuracy after" in line for line in lines)


def test_a_mode_that_there_is_not(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, "console=jsn") == 2
    error = capsys.readouterr().err
    assert "console=jsn is an invalid value; did you mean 'json'?" in error and error.count("\n") == 1
