"""What Hydra calls for each job: it travels to other processes, and says how the job ended."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from helpers import read_json, train

from dppo_cli.cli.hydra_job import HydraJob
from dppo_cli.cli.table import COMMANDS
from dppo_cli.errors import NumericalError
from dppo_cli.training.learner import Learner

pytestmark = pytest.mark.usefixtures("work")

NOTHING = "no step was finished; nothing is saved"


@pytest.fixture
def fails_once(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fails_once(error)`: the first update of all raises it."""
    real = Learner.update

    def arranged(error: Exception) -> None:
        errors = [error]

        def update(self: Learner, *args: Any) -> Any:
            if errors:
                raise errors.pop()
            return real(self, *args)

        monkeypatch.setattr(Learner, "update", update)

    return arranged


@pytest.mark.parametrize("command", COMMANDS)
def test_a_job_can_be_pickled(command: str) -> None:
    """Launchers send it to other processes."""
    job = HydraJob(command)
    assert pickle.loads(pickle.dumps(job)) == job


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (ZeroDivisionError("a bug"), 1, "ZeroDivisionError: a bug"),
        (ValueError("a bug"), 1, "ValueError: a bug"),
        (
            NumericalError("the loss is NaN"),
            1,
            f"step 1: the loss is NaN; no weight was changed, and the batch is in {{batch}}; {NOTHING}",
        ),
    ],
)
def test_a_job_of_a_sweep_that_breaks_is_recorded_and_the_others_run(
    error: Exception,
    status: int,
    says: str,
    model: Path,
    work: Path,
    fails_once: Any,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    fails_once(error)
    batch = work / "sweep/0/nonfinite-step-1.json"
    says = says.format(batch=batch)
    assert train(model, "-m", "seed=1,2", "steps=1", "run_dir=sweep") == status
    record = read_json(work / "sweep/0/job.json")
    assert (record["status"], record["error"], record["summary"]) == (status, says, None)
    kept = {"job.json", batch.name} if isinstance(error, NumericalError) else {"job.json"}
    assert {p.name for p in (work / "sweep/0").iterdir()} == kept
    assert read_json(work / "sweep/1/job.json")["status"] == 0
    captured = capsys.readouterr()
    assert f"failed: {says.partition(';')[0]}" in captured.out
    assert captured.err.endswith(f"dppo: 1 of 2 jobs failed; job 0: {says}\n")
    # Only a bug has a stack trace, which says what is saved, too.
    assert ("Traceback" in captured.err) == (f"\ndppo: {NOTHING}\n" in captured.err)
    assert ("Traceback" in captured.err) == (not isinstance(error, NumericalError))


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), ValueError("a bug")])
def test_a_bug_in_a_single_run_is_shown_whole(error: Exception, model: Path, work: Path, fails_once: Any) -> None:
    fails_once(error)
    with pytest.raises(type(error), match="a bug") as raised:
        train(model, "run_dir=run")
    assert raised.value.__notes__ == [f"dppo: {NOTHING}"]
    assert not (work / "run").exists()


def test_a_single_run_leaves_no_record(model: Path, work: Path) -> None:
    assert train(model, "steps=1", "run_dir=run") == 0
    assert not list(work.rglob("job.json"))
