"""Sweeps whose jobs run in other processes, and searches: table and exit status come from what each job wrote."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import TINY_RUN, read_json

from dppo_cli.cli.main import main

pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra dppo[sweeps]")


OPTUNA_WARNS = pytest.mark.filterwarnings("ignore:The ``declarative_base")
"""When it is imported."""


@pytest.fixture
def sweep(model: Path, work: Path):
    """`dppo train -m` in a process of its own: its exit status, output and error."""

    def run(*overrides: str) -> tuple[int, str, str]:
        command = [sys.executable, "-m", "dppo_cli", *words(model, *overrides)]
        wide = {**os.environ, "COLUMNS": "200"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=work, env=wide, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def search(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The same in this process, for jobs that run in the sweep's own."""

    def run(*overrides: str) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "200")
        status = main(words(model, "hydra/sweeper=optuna", *overrides))
        return status, *capsys.readouterr()

    return run


def words(model: Path, *overrides: str) -> list[str]:
    data = ["data.train_problems=32", f"model.path={model}"]
    return ["train", "-m", *TINY_RUN, *data, "run_dir=sweep", "steps=1", *overrides]


def rows(output: str) -> dict[str, list[str]]:
    """Cells of the sweep's table by the job's number, lines of folded cells joined."""
    found: dict[str, list[str]] = {}
    last = ""
    for line in output.split(" sweep ")[1].splitlines():
        if line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            last = cells[0] or last
            found[last] = [a + b for a, b in zip(found.get(last, [""] * len(cells)), cells, strict=True)]
    return found


@pytest.mark.parametrize(
    "launcher",
    [["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]],
    ids=["joblib", "submitit_local"],
)
def test_jobs_in_other_processes(sweep, work: Path, launcher: list[str]) -> None:
    status, output, error = sweep(*launcher, "optim.lr=-1,0.001")
    assert status == 2
    table = rows(output)
    assert table["0"][1:5] == ["optim.lr=-1", "-", "-", "-"] and "breaks the rule lr > 0" in table["0"][5]
    assert table["1"][1:4] == ["optim.lr=0.001", "0.0%", "0.0%"] and table["1"][5] == "sweep/1"
    assert error.splitlines()[-1] == "dppo: 1 of 2 jobs failed; job 0: optim.lr=-1.0 breaks the rule lr > 0"
    record = read_json(work / "sweep/0/job.json")
    assert (record["status"], record["summary"]) == (2, None)
    assert read_json(work / "sweep/1/summary.json") == read_json(work / "sweep/1/job.json")["summary"]


def test_a_users_module_is_found_in_other_processes(sweep, work: Path) -> None:
    (work / "mine.py").write_text("def f(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n")
    status, output, _ = sweep("hydra/launcher=joblib", "seed=1,2", "reward=function", "reward.path=mine:f")
    assert status == 0
    assert [row[2:4] for row in rows(output).values()] == [["100.0%", "100.0%"]] * 2


@OPTUNA_WARNS
def test_optuna_searches_for_the_best_held_out_accuracy(search, work: Path) -> None:
    """Seeds of a random model differ in how many of its answers have a 5 in them."""
    (work / "fives.py").write_text(
        "def f(prompts, completions, **columns):\n    return [float('5' in text) for text in completions]\n"
    )
    of = ["hydra/sweeper/sampler=random", "hydra.sweeper.sampler.seed=3", "hydra.sweeper.n_trials=3"]
    reward = ["reward=function", "reward.path=fives.py:f", "data.eval_problems=32"]
    status, output, error = search(*of, "seed=range(1,9)", *reward)
    assert status == 0, error
    accuracy = {row[1]: float(row[3].rstrip("%")) for row in rows(output).values()}
    assert len(rows(output)) == 3
    best = yaml.safe_load((work / "sweep/optimization_results.yaml").read_text())
    assert 100 * best["best_value"] == pytest.approx(max(accuracy.values()), abs=0.06)
    assert accuracy[f"seed={best['best_params']['seed']}"] == max(accuracy.values()) > min(accuracy.values())


@OPTUNA_WARNS
def test_a_search_of_which_every_job_fails_ends_in_words(search, work: Path) -> None:
    status, output, error = search("hydra.sweeper.n_trials=2", "optim.lr=interval(-2,-1)")
    assert status == 2 and len(rows(output)) == 2
    assert "Traceback" not in error and error.splitlines()[-1].startswith(
        "dppo: 2 of 2 jobs failed; job 0: optim.lr=-1."
    )
    assert not (work / "sweep").exists()
