"""Signals to `dppo train` in its own process: the exit status, what is saved, and that the run goes on from there."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import disturbed
import pytest
from disturbed import outcome, popen, wait, wait_for
from helpers import read_json, read_lines, train

from dppo_cli.cli.main import main
from dppo_cli.training.checkpoint import check

# Files say where the run is: call-1 is the evaluation at the start, call-2 and so on are the steps.
REWARD = """\
import time
from pathlib import Path

calls = 0


def slow(prompts, completions, **columns):
    global calls
    calls += 1
    Path(f"call-{calls}").touch()
    if Path("nap").exists() and calls == 3:
        time.sleep(float(Path("nap").read_text()))
    return [sum(ord(c) % 16 for c in text) / (15 * max(1, len(text))) for text in completions]
"""
WORDS = ("steps=4", "optim.lr=0.01", "adapter.dropout=0.1", "reward.path=mine.py:slow", "run_dir=run")

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def undisturbed(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "mine.py").write_text(REWARD)
        assert train(tiny_models["llama3"], *WORDS) == 0
        return outcome(folder / "run")


Start = Callable[..., BaseProcess]


@pytest.fixture
def start(model: Path, work: Path) -> Iterator[Start]:
    """`start("checkpoint.grace=1")`: the process, which is in the call of the reward in step 2."""
    (work / "mine.py").write_text(REWARD)
    (work / "nap").write_text("0.5")
    processes = []

    def started(*words: str, at: str = "call-3") -> BaseProcess:
        processes.append(disturbed.start(model, *WORDS, *words))
        wait_for((work / at).exists, at)
        return processes[-1]

    yield started
    for process in processes:
        process.kill()
        process.join()


def send(process: BaseProcess, signum: int) -> None:
    assert process.pid is not None
    os.kill(process.pid, signum)


def check_saved_and_go_on(work: Path, step: int, undisturbed: dict[str, Any]) -> None:
    """What a run that was stopped after `step` steps leaves, and what becomes of it."""
    text = f"dppo: stopped: the state after step {step} is saved; to go on: dppo train resume=run\n"
    assert (work / "errors.txt").read_text() == text
    summary = read_json(work / "run/summary.json")
    assert (summary["steps"], summary["interrupted"], summary["eval_after"]) == (step, True, None)
    assert [row["step"] for row in read_lines(work / "run/metrics.jsonl")] == list(range(1, step + 1))
    assert check(work / f"run/checkpoints/step-{step}")["step"] == step
    (work / "nap").unlink()
    assert main(["train", "resume=run"]) == 0
    assert outcome(work / "run") == undisturbed


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_stops_after_the_step_in_progress(
    signum: signal.Signals, status: int, start: Start, work: Path, undisturbed: dict[str, Any]
) -> None:
    process = start()
    send(process, signum)
    assert wait(process, 30) == status
    said = f"warning: {signum.name}: stopping after this step, within 60 seconds; once more to stop at once\n"
    assert said in (work / "output.txt").read_text()
    check_saved_and_go_on(work, 2, undisturbed)


def test_a_second_signal_stops_at_once(start: Start, work: Path, undisturbed: dict[str, Any]) -> None:
    (work / "nap").write_text("30")
    process = start()
    send(process, signal.SIGTERM)
    wait_for(lambda: "SIGTERM: stopping" in (work / "output.txt").read_text(), "the answer")
    started = time.monotonic()
    send(process, signal.SIGTERM)
    assert wait(process, 30) == 143
    assert time.monotonic() - started < 10
    check_saved_and_go_on(work, 1, undisturbed)


def test_a_step_that_takes_longer_than_the_grace_is_lost(start: Start, work: Path, undisturbed: dict[str, Any]) -> None:
    (work / "nap").write_text("30")
    process = start("checkpoint.grace=0.2")
    started = time.monotonic()
    send(process, signal.SIGTERM)
    assert wait(process, 30) == 143
    assert 0.2 < time.monotonic() - started < 10
    check_saved_and_go_on(work, 1, undisturbed)


def test_sigusr1_writes_a_checkpoint_and_goes_on(start: Start, work: Path, undisturbed: dict[str, Any]) -> None:
    process = start()
    send(process, signal.SIGUSR1)
    wait_for((work / "run/checkpoints/step-2").exists, "the checkpoint")
    assert check(work / "run/checkpoints/step-2")["step"] == 2
    assert wait(process, 30) == 0, (work / "errors.txt").read_text()
    # No other one was written before the end.
    assert sorted(path.name for path in (work / "run/checkpoints").iterdir()) == ["step-2", "step-4"]
    assert outcome(work / "run") == undisturbed


def test_a_signal_before_the_first_step_is_finished_leaves_nothing(start: Start, work: Path) -> None:
    (work / "mine.py").write_text(REWARD.replace("calls == 3", "calls == 1"))
    process = start(at="call-1")  # the evaluation at the start
    send(process, signal.SIGTERM)
    assert wait(process, 30) == 143
    assert (work / "errors.txt").read_text() == "dppo: stopped: no step was finished; nothing is saved\n"
    assert not (work / "run").exists()


def test_a_signal_to_the_command_itself(model: Path, work: Path, undisturbed: dict[str, Any]) -> None:
    """As a shell or a scheduler sees it, from the first import to the exit status."""
    (work / "mine.py").write_text(REWARD)
    (work / "nap").write_text("0.5")
    with popen(model, *WORDS) as process:
        wait_for((work / "call-3").exists, "step 2")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
    check_saved_and_go_on(work, 2, undisturbed)


def test_sigusr1_while_the_model_is_loading_is_no_reason_to_die(
    model: Path, work: Path, undisturbed: dict[str, Any]
) -> None:
    (work / "mine.py").write_text(REWARD)
    with popen(model, *WORDS) as process:
        # From where Python hears signals to the first evaluation, which is when the run has handlers of its own.
        wait_for(lambda: _hears(process.pid, signal.SIGUSR1), "the handler")
        while not (work / "call-1").exists():
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.05)
            assert process.poll() is None
        assert process.wait(60) == 0, (work / "errors.txt").read_text()
    assert outcome(work / "run") == undisturbed


def _hears(pid: int, signum: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (signum - 1) & 1)
