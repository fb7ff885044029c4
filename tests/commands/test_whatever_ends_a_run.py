"""Whatever ends a run, the state after its last finished step is saved, the error says where, and the run can go on."""

import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from disturbed import command, fail_at, outcome
from ended_runs import FULL, WORDS, write_reward
from helpers import read_json, read_lines, train
from safetensors import SafetensorError

from dppo_cli.cli.main import main
from dppo_cli.errors import NumericalError
from dppo_cli.training import checkpoint
from dppo_cli.training.checkpoint import check
from dppo_cli.training.learner import Learner
from dppo_cli.training.run_folder import RunFolder

SAVED = "the state after step 2 is saved; to go on: dppo train resume=run"

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture
def ends(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str], undisturbed: dict[str, Any]
) -> Callable[..., str]:
    """`ends(status, arrange, *words)`: the run ends so and is saved; what it said. Then, mended, it goes on."""

    def run(status: int, arrange: Callable[[pytest.MonkeyPatch], None], *words: str) -> str:
        write_reward(work)
        with pytest.MonkeyPatch.context() as patch:
            arrange(patch)
            assert train(model, *WORDS, *words, "run_dir=run") == status
        said = capsys.readouterr().err
        assert said.startswith("dppo: ") and said.endswith(f"; {SAVED}\n") and said.count("\n") == 1
        check_saved_and_go_on(work, undisturbed)
        return said.removeprefix("dppo: ").removesuffix(f"; {SAVED}\n")

    return run


def check_saved_and_go_on(work: Path, undisturbed: dict[str, Any]) -> None:
    run = work / "run"
    assert check(run / "checkpoints/step-2")["step"] == 2
    summary = read_json(run / "summary.json")
    assert (summary["steps"], summary["interrupted"], summary["eval_after"]) == (2, True, None)
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1, 2]
    assert (run / "masked_tokens.json").is_file() and (run / "adapter/adapter_config.json").is_file()
    assert not list(run.rglob("*.tmp"))
    (work / "broken").unlink(missing_ok=True)
    assert main(["train", "resume=run"]) == 0
    assert outcome(run) == undisturbed


# The user's reward


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("raise ValueError('no idea')", "mine.py:late failed: ValueError: no idea"),
        ("return rewards[:-1]", "mine.py:late returned a list of 7; expected a list of 8 numbers"),
        ("rewards[3] = 'good'", "mine.py:late returned 'good' for problem"),
        ("rewards[3] = float('nan')", "mine.py:late returned nan for problem"),
        ("sys.exit()", "its process ended (exit status 0); that is reward.max_failures=2 times in a row"),
        ("os.kill(os.getpid(), 9)", "its process ended (SIGKILL)"),
    ],
)
def test_a_reward_that_breaks(
    broken: str, says: str, model: Path, work: Path, capsys: pytest.CaptureFixture[str], undisturbed: dict[str, Any]
) -> None:
    write_reward(work, broken)
    assert train(model, *WORDS, "run_dir=run") == 2
    error = capsys.readouterr().err
    assert says in error and error.endswith(f"; {SAVED}\n")
    check_saved_and_go_on(work, undisturbed)


def test_what_a_reward_does_to_its_process_does_not_reach_the_run(
    model: Path, work: Path, undisturbed: dict[str, Any]
) -> None:
    write_reward(work, "os.chdir('/'); sys.stdout.close(); os.environ.clear()")
    assert train(model, *WORDS, "run_dir=run") == 0
    assert outcome(work / "run") == undisturbed


# Numbers, bugs


def test_a_numerical_failure(ends: Callable[..., str]) -> None:
    """In the second update of step 3. What it was is kept, and the resume does not stumble over it."""
    said = ends(1, lambda patch: fail_at(6, Learner, "update", patch, NumericalError("the gradient is nan")))
    assert said.startswith("step 3: the gradient is nan")


@pytest.mark.parametrize("error", [RuntimeError("a bug"), SystemExit(7)])
def test_a_bug_keeps_its_trace_and_says_where_the_run_is(
    error: BaseException, model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Any]
) -> None:
    write_reward(work)
    with monkeypatch.context() as patch:
        fail_at(6, Learner, "update", patch, error)
        with pytest.raises(type(error)) as raised:
            train(model, *WORDS, "run_dir=run")
    assert raised.value is error and error.__notes__ == [f"dppo: {SAVED}"]
    check_saved_and_go_on(work, undisturbed)


# The disk


@pytest.mark.parametrize("after", [False, True], ids=["nothing of the line is written", "all of the line is written"])
def test_a_disk_that_is_full_in_the_metrics(after: bool, ends: Callable[..., str]) -> None:
    said = ends(2, lambda patch: fail_at(3, RunFolder, "log", patch, FULL, after=after))
    assert said == "run cannot be written any more: No space left on device"


@pytest.mark.parametrize(
    "error", [FULL, SafetensorError("Error while serializing: I/O error: No space left on device")]
)
def test_a_disk_that_is_full_in_a_checkpoint(error: Exception, ends: Callable[..., str]) -> None:
    """For a moment: the state can be saved when the run ends."""
    said = ends(2, lambda patch: fail_at(2, checkpoint, "save_file", patch, error), "checkpoint.every=1")
    assert said.startswith("run cannot be written any more: ") and "No space left on device" in said


# What reads the output


def test_a_reader_that_leaves_ends_nothing(model: Path, work: Path, undisturbed: dict[str, Any]) -> None:
    """`dppo train | head -3`"""
    write_reward(work)
    words = command(model, *WORDS, "run_dir=run")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{shlex.join(words)} | head -3"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 3
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    found = outcome(work / "run")
    # The console has stopped, which may be told.
    assert all("BrokenPipeError" in text for text in set(found.pop("warnings")) - set(undisturbed["warnings"]))
    assert found == {key: value for key, value in undisturbed.items() if key != "warnings"}
