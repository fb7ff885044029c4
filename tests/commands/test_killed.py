"""Runs that are killed at any moment (SIGKILL, as by the system when memory runs out) and started again."""

import json
import random
import time
from pathlib import Path
from typing import Any

import disturbed
import pytest
from disturbed import outcome
from helpers import read_lines, write_rewards

from dppo_cli.training.checkpoint import MANIFEST, check, checkpoints

WORDS = (
    "steps=5",
    "optim.lr=0.01",
    "adapter.dropout=0.1",
    "eval.every=2",
    "eval.success_reward=0.45",
    "checkpoint.every=1",
    "run_dir=run",
    "resume=auto",
)
ANEW = "the run has no complete checkpoint; it starts anew"
KILLED = -9

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def undisturbed(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Also: the seconds that the run took, and how often it changed its folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        # Twice, because the first of all processes waits until everything is imported.
        for words in ((*WORDS, "run_dir=first"), WORDS):
            started = time.monotonic()
            assert disturbed.run(tiny_models["llama3"], *words) == 0, (folder / "errors.txt").read_text()
        seconds, changes = time.monotonic() - started, int((folder / "changes").read_text())
        return {"outcome": outcome(folder / "run"), "seconds": seconds, "changes": changes}


def check_what_is_left(work: Path) -> None:
    """Whole lines of the steps in order, of which the last may be torn, and a checkpoint that lags behind them."""
    metrics = work / "run/metrics.jsonl"
    lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    # What is called a checkpoint is one: it is renamed when it is complete. Only those before the newest are removed,
    # their manifest first.
    found = checkpoints(work / "run")
    steps = [check(path)["step"] for path in found if path == found[-1] or (path / MANIFEST).exists()]
    # One is written after each step.
    assert max(steps, default=0) >= len(lines) - 1


def check_equal(work: Path, undisturbed: dict[str, Any]) -> None:
    found, expected = outcome(work / "run"), dict(undisturbed["outcome"])
    # Processes that were killed before the first checkpoint leave nothing to go on with, which is told.
    assert [text for text in found.pop("warnings") if text != ANEW] == expected.pop("warnings")
    assert found == expected
    assert [row["step"] for row in read_lines(work / "run/metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert not [path for path in (work / "run").rglob("*") if path.name.endswith(".tmp")]


def killed_again_and_again(kills: int, seed: int, model: Path, work: Path, undisturbed: dict[str, Any]) -> None:
    moments, folders = random.Random(seed), 0
    while kills:
        process = disturbed.start(model, *WORDS)
        process.join(moments.uniform(0, undisturbed["seconds"]))
        process.kill()
        process.join()
        if process.exitcode == KILLED:
            kills -= 1
            check_what_is_left(work)
        else:
            # It was done before.
            assert process.exitcode == 0, (work / "errors.txt").read_text()
            check_equal(work, undisturbed)
            folders += 1
            (work / "run").rename(work / f"finished-{folders}")
    assert disturbed.run(model, *WORDS) == 0, (work / "errors.txt").read_text()
    check_equal(work, undisturbed)


def test_a_run_that_is_killed_a_few_times_equals_an_undisturbed_one(
    model: Path, work: Path, undisturbed: dict[str, Any]
) -> None:
    killed_again_and_again(4, 0, model, work, undisturbed)


@pytest.mark.slow
def test_a_run_that_is_killed_a_hundred_times_equals_an_undisturbed_one(
    model: Path, work: Path, undisturbed: dict[str, Any]
) -> None:
    killed_again_and_again(100, 1, model, work, undisturbed)


def killed_at_a_change(number: int, model: Path, work: Path, undisturbed: dict[str, Any]) -> None:
    """A process is killed at a change of its folder, the one that goes on a little later in the same way."""
    assert disturbed.run(model, *WORDS, dies_at=number) == KILLED, (work / "errors.txt").read_text()
    check_what_is_left(work)
    # It changes less, so it may come to its end.
    second = disturbed.run(model, *WORDS, dies_at=max(0, 2 * number - undisturbed["changes"]))
    assert second in (KILLED, 0), (work / "errors.txt").read_text()
    check_what_is_left(work)
    assert disturbed.run(model, *WORDS) == 0, (work / "errors.txt").read_text()
    check_equal(work, undisturbed)


# Before the config has its name; in the middle; the last.
@pytest.mark.parametrize("number", [3, 45, -1])
def test_a_run_that_is_killed_at_a_change_of_its_folder_equals_an_undisturbed_one(
    number: int, model: Path, work: Path, undisturbed: dict[str, Any]
) -> None:
    killed_at_a_change(number % undisturbed["changes"], model, work, undisturbed)


@pytest.mark.slow
def test_a_run_may_be_killed_at_any_change_of_its_folder(
    model: Path, tmp_path: Path, undisturbed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every fourth of them: a checkpoint makes many more, so each kind of change is among these."""
    for number in range(1, undisturbed["changes"], 4):
        work = tmp_path / f"at-{number}"
        work.mkdir()
        write_rewards(work)
        monkeypatch.chdir(work)
        killed_at_a_change(number, model, work, undisturbed)
