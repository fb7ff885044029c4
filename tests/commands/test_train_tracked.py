"""`dppo train tracker=...`: a run with a tracker is the same run."""

from pathlib import Path

import pytest
from helpers import read_json, read_lines, train

from dppo_cli.telemetry import trackers


def rewards(folder: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "trackers/tensorboard")).Reload()
    return [(event.step, event.value) for event in found.Scalars("reward")]


def test_a_run_with_tensorboard_is_the_same_run_and_goes_on(model: Path, work: Path) -> None:
    assert train(model, "run_dir=alone", "steps=2") == 0
    assert train(model, "run_dir=run", "steps=2", "tracker=tensorboard") == 0
    alone, tracked = (read_json(work / name / "summary.json") for name in ("alone", "run"))
    assert tracked["adapter_sha256"] == alone["adapter_sha256"] and tracked["warnings"] == []
    assert train(model, "resume=run", "steps=3") == 0
    lines = read_lines(work / "run/metrics.jsonl")
    assert rewards(work / "run") == [(line["step"], pytest.approx(line["reward"])) for line in lines]
    assert len(lines) == 3


def test_one_that_is_not_installed_is_refused_before_anything_is_loaded(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    monkeypatch.setattr("dppo_cli.commands.train.load_policy", lambda *_, **__: pytest.fail("loaded"))
    assert train(model, "tracker=wandb", "run_dir=run") == 2
    assert capsys.readouterr().err == "dppo: tracker=wandb needs a package that is not installed: pip install wandb\n"
    assert not (work / "run").exists()
    assert train(model, "tracker=wandbb") == 2
    assert "did you mean 'wandb'" in capsys.readouterr().err


def test_a_run_survives_a_tracker_that_fails(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setitem(trackers.STARTS, "tensorboard", fail)
    assert train(model, "tracker=tensorboard", "run_dir=run", "steps=1") == 0
    summary = read_json(work / "run/summary.json")
    assert summary["steps"] == 1
    text = "Tracker failed and is switched off: RuntimeError: tracker=tensorboard: ConnectionError: no network"
    assert summary["warnings"] == [text]
