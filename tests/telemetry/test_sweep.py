"""The table at the end of a sweep."""

from pathlib import Path
from typing import Any

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from dppo_cli.errors import ConfigError
from dppo_cli.telemetry.sweep import SweepTable

NO_CONFIG = OmegaConf.create({})


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)


def job(overrides: list[str], result: Any, status: JobStatus = JobStatus.COMPLETED) -> JobReturn:
    made = JobReturn(overrides=overrides, status=status)
    made.return_value = result
    return made


def rows(jobs: list[JobReturn], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """Cells of the table's rows."""
    table = SweepTable()
    for each in jobs:
        table.on_job_end(NO_CONFIG, each)
    table.on_multirun_end(NO_CONFIG)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


def test_a_row_per_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"eval_before": 0.3125, "eval_after": 0.875, "seconds": 61.7, "run_dir": str(tmp_path / "sweeps/x/0")}
    jobs = [
        job(["divergence=tv", "seed=1"], summary),
        job(["divergence=kl", "seed=1"], {**summary, "eval_after": 0.5, "run_dir": str(tmp_path / "sweeps/x/1")}),
    ]
    assert rows(jobs, capsys) == [
        ["0", "divergence=tv", "31.2%", "87.5%", "62", "sweeps/x/0"],
        ["1", "divergence=kl", "31.2%", "50.0%", "62", "sweeps/x/1"],
    ]


def test_only_what_varies_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"eval_before": 0.0, "eval_after": 1.0}
    jobs = [job([f"seed={s}", "steps=3", f"approx={a}", "run_dir=here"], summary) for s in "12" for a in ("x", "y")]
    shown = rows(jobs, capsys)
    assert [row[1] for row in shown] == ["seed=1 approx=x", "seed=1 approx=y", "seed=2 approx=x", "seed=2 approx=y"]


def test_a_single_job_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows([job(["seed=1", "steps=3"], {"eval_before": 0.0, "eval_after": 1.0})], capsys)
    assert row[1] == "seed=1 steps=3"


def test_a_sweep_of_evaluations(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows([job(["sampling.temperature=0.5"], {"accuracy": 0.25, "seconds": 3.0})], capsys)
    assert row == ["0", "sampling.temperature=0.5", "-", "25.0%", "3", ""]


def test_a_job_that_failed_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows([job(["optim.lr=-1"], ConfigError("optim.lr=-1.0 breaks the rule lr > 0"))], capsys)
    assert row == ["0", "optim.lr=-1", "-", "-", "-", "failed: optim.lr=-1.0 breaks the rule lr > 0"]


def test_a_job_that_broke_is_hydras_to_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert rows([job(["seed=1"], ValueError("a bug"), JobStatus.FAILED)], capsys) == []
