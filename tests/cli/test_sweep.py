"""What a sweep's jobs leave behind, and what is shown of it at the end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dppo_cli.cli.sweep import JobRecord, exit_status, failures, read_records, show

DONE = {"eval_before": 0.0, "eval_after": 1.0}


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)


def jobs(*ended: tuple[list[str], dict[str, Any]]) -> list[JobRecord]:
    """Jobs that ended well, with their overrides and summaries."""
    return [JobRecord(number, overrides, summary=summary) for number, (overrides, summary) in enumerate(ended)]


def failed(number: int, status: int = 2, error: str = "no", overrides: tuple[str, ...] = ()) -> JobRecord:
    return JobRecord(number, list(overrides), status, error)


def rows(records: list[JobRecord], capsys: pytest.CaptureFixture[str], *typed: str) -> list[list[str]]:
    """Cells of the table's rows."""
    show(records, typed)
    lines = capsys.readouterr().out.splitlines()
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]


# The table


def test_a_row_per_job(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = {"eval_before": 0.3125, "eval_after": 0.875, "seconds": 61.7, "run_dir": str(tmp_path / "sweeps/x/0")}
    other = {**summary, "eval_after": 0.5, "run_dir": str(tmp_path / "sweeps/x/1")}
    assert rows(jobs((["divergence=tv", "seed=1"], summary), (["divergence=kl", "seed=1"], other)), capsys) == [
        ["0", "divergence=tv", "31.2%", "87.5%", "62", "sweeps/x/0"],
        ["1", "divergence=kl", "31.2%", "50.0%", "62", "sweeps/x/1"],
    ]


def test_only_what_varies_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    varied = [[f"seed={s}", "steps=3", f"approx={a}", "run_dir=here"] for s in "12" for a in ("x", "y")]
    shown = rows(jobs(*((overrides, DONE) for overrides in varied)), capsys)
    assert [row[1] for row in shown] == ["seed=1 approx=x", "seed=1 approx=y", "seed=2 approx=x", "seed=2 approx=y"]


def test_of_a_single_job_what_was_not_typed_for_all_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Of a sweep that was stopped there may be no other one."""
    single = jobs((["seed=1", "steps=3", "recipes/x=recipe"], DONE))
    (row,) = rows(single, capsys, "seed=1,2", "steps=3", "+recipes/x=recipe")
    assert row[1] == "seed=1"
    (row,) = rows(single, capsys)
    assert row[1] == "seed=1 steps=3 recipes/x=recipe"


def test_a_sweep_of_evaluations(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows(jobs((["sampling.temperature=0.5"], {"accuracy": 0.25, "seconds": 3.0})), capsys)
    assert row == ["0", "sampling.temperature=0.5", "-", "25.0%", "3", ""]
    (row,) = rows(jobs((["seed=1"], {"accuracy": 0.25, "seconds": 3.0, "out": str(tmp_path / "evals/x")})), capsys)
    assert row == ["0", "seed=1", "-", "25.0%", "3", "evals/x"]


def test_what_a_command_does_not_say_is_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupted run has no accuracy after it, and an export neither accuracies nor seconds."""
    shown = rows(jobs((["a=1"], {**DONE, "eval_after": None, "seconds": 1.0}), (["a=2"], {"out": "m"})), capsys)
    assert shown == [["0", "a=1", "0.0%", "-", "1", ""], ["1", "a=2", "-", "-", "-", "m"]]


def test_a_job_that_failed_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = rows([failed(0, error="optim.lr=-1.0 breaks the rule lr > 0", overrides=("optim.lr=-1",))], capsys)
    assert row == ["0", "optim.lr=-1", "-", "-", "-", "failed: optim.lr=-1.0 breaks the rule lr > 0"]


def test_text_with_brackets_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would read [red] as a colour."""
    (row,) = rows([failed(0, error="[red]x[/red]", overrides=("optim.betas=[0.9,0.99]", "run_dir=[bold]"))], capsys)
    assert row[1] == "optim.betas=[0.9,0.99] run_dir=[bold]" and row[5] == "failed: [red]x[/red]"


# Status


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [([], 0), ([0], 0), ([0, 0], 0), ([0, 1], 1), ([1, 2, 0], 2), ([2, 1], 2), ([2, 130], 2), ([0, 130], 130)],
)
def test_the_exit_status_of_a_sweep(statuses: list[int], expected: int) -> None:
    """2 where a job ended by a user's mistake, else 1 where one failed."""
    assert exit_status([failed(number, status) for number, status in enumerate(statuses)]) == expected


def test_failures_are_told_in_a_line() -> None:
    ended = jobs((["seed=1"], DONE))
    assert failures([*ended, failed(1, error="this"), failed(2, error="that")]) == "2 of 3 jobs failed; job 1: this"


# Records


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    """By the number of the job, and not by its name: 10 comes after 9."""
    written = [replace(failed(number), overrides=[f"seed={number}"]) for number in range(12)]
    written[3] = jobs(([], {}), ([], {}), ([], {}), (["seed=3"], {**DONE, "pass_at": {"1": 0.5}}))[3]
    for record in reversed(written):
        record.write(tmp_path / "sweep" / str(record.number))
    assert read_records(tmp_path / "sweep") == written
    assert sorted(p.name for p in (tmp_path / "sweep/0").iterdir()) == ["job.json"]
    assert json.loads((tmp_path / "sweep/3/job.json").read_text(encoding="utf-8"))["status"] == 0


def test_a_folder_without_records(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    assert read_records(tmp_path) == read_records(tmp_path / "nowhere") == []


def test_a_single_run_inside_is_no_job(tmp_path: Path) -> None:
    """Only the folders right below a sweep are its jobs."""
    failed(0).write(tmp_path / "sweep/0")
    failed(1).write(tmp_path / "sweep/0/below")
    assert [record.number for record in read_records(tmp_path / "sweep")] == [0]
