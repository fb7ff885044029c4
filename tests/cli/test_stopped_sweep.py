"""A sweep in joblib's processes that is stopped: every job is saved, and none is left running."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from disturbed import command, wait_for
from helpers import read_json, read_lines, train

from dppo_cli.cli.stop import SAID, Launching, StopsJobs, times
from dppo_cli.training.checkpoint import check

REWARD = """\
import time
from pathlib import Path


def slow(prompts, completions, **columns):
    if Path("nap").exists():
        time.sleep(float(Path("nap").read_text()))
    return [sum(ord(c) % 16 for c in text) / (15 * max(1, len(text))) for text in completions]
"""
WORDS = ("-m", "seed=1,2,3", "steps=40", "reward.path=mine.py:slow", "run_dir=sweep")
TWO = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")

Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def start(model: Path, work: Path) -> Iterator[Start]:
    """A sweep of which two jobs have done a step, in a process group of its own, as in a terminal."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra dppo[sweeps]")
    (work / "mine.py").write_text(REWARD)
    (work / "nap").write_text("0.3")
    processes = []

    def started() -> "subprocess.Popen[str]":
        # A shell has what runs in the background ignore SIGINT, which would be inherited.
        code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        code += "from dppo_cli.cli.main import main; sys.exit(main())"
        words = [sys.executable, "-c", code, *command(model, *WORDS, *TWO)[3:]]
        with open("output.txt", "w") as output, open("errors.txt", "w") as errors:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
            processes.append(
                subprocess.Popen(
                    words, stdout=output, stderr=errors, text=True, env=environment, start_new_session=True
                )
            )
        for job in "01":
            wait_for((work / f"sweep/{job}/metrics.jsonl").exists, f"a step of job {job}")
        return processes[-1]

    yield started
    for process in processes:
        if group(process):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def group(process: "subprocess.Popen[str]") -> list[str]:
    """The processes of its group that are at work, workers included."""
    found = subprocess.run(["ps", "-wweo", "pgid=,stat=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in found.splitlines()]
    return [args for pgid, state, args in rows if int(pgid) == process.pid and state[0] != "Z"]


def check_saved(work: Path, job: int) -> None:
    run = work / f"sweep/{job}"
    summary, record = read_json(run / "summary.json"), read_json(run / "job.json")
    step = summary["steps"]
    assert 1 <= step < 40 and summary["interrupted"]
    assert record["error"].startswith(f"stopped: the state after step {step} is saved")
    assert check(run / f"checkpoints/step-{step}")["step"] == step == len(read_lines(run / "metrics.jsonl"))


def test_ctrl_c_stops_every_job_after_its_step(start: Start, work: Path, model: Path) -> None:
    process = start()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process
    assert process.wait(60) == 130
    assert (work / "errors.txt").read_text().splitlines() == [
        "dppo: SIGINT: each job stops after its step, and is saved; once more to stop at once",
        "dppo: stopped: to go on: the same command with run_dir=sweep resume=auto",
    ]
    for job in (0, 1):
        check_saved(work, job)
    # The third had not begun.
    assert not (work / "sweep/2/config.yaml").exists() and not (work / "sweep/.stop").exists()
    assert (work / "output.txt").read_text().count("failed: stopped: the state after step") == 2
    (work / "nap").unlink()
    assert train(model, *WORDS, "resume=auto") == 0
    assert [read_json(work / f"sweep/{job}/summary.json")["steps"] for job in (0, 1, 2)] == [40] * 3


def test_a_second_signal_stops_at_once(start: Start, work: Path) -> None:
    process = start()
    (work / "nap").write_text("100")
    done = [len(read_lines(work / f"sweep/{job}/metrics.jsonl")) for job in (0, 1)]
    for _ in range(2):
        process.terminate()  # as a scheduler does: the process that it knows
        time.sleep(0.1)
    assert process.wait(60) == 143
    assert (work / "errors.txt").read_text().splitlines()[:2] == [f"dppo: SIGTERM: {text}" for text in SAID]
    for job in (0, 1):
        check_saved(work, job)
        assert done[job] <= read_json(work / f"sweep/{job}/summary.json")["steps"] <= done[job] + 3


def test_jobs_of_a_sweep_that_was_killed_stop_by_themselves(start: Start, work: Path) -> None:
    process = start()
    process.kill()
    assert process.wait(60) == -signal.SIGKILL
    wait_for(lambda: not any("LokyProcess" in args for args in group(process)), "the end of the jobs")
    for job in (0, 1):
        check_saved(work, job)
        assert read_json(work / f"sweep/{job}/job.json")["status"] == 143


# The sweep's process


@pytest.fixture
def ctrl_c() -> Iterator[Callable[[], None]]:
    def send() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # Until it is raised.

    # A shell has what runs in the background ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield send
    signal.signal(signal.SIGINT, before)


def test_a_third_signal_is_the_launchers(
    ctrl_c: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sweep").mkdir()
    Path("sweep/.stop").write_text("of a sweep that was killed")
    with StopsJobs(Path("sweep")) as stops:
        monkeypatch.setattr(Launching, "by_joblib", True)
        assert times(stops.file) == 0 and stops.signum is None
        for n in (1, 2):
            ctrl_c()
            assert (times(stops.file), stops.signum) == (n, signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
    assert capsys.readouterr().err.splitlines() == [f"dppo: SIGINT: {text}" for text in SAID]
    assert not stops.file.exists()


def test_of_other_launchers_every_signal_is(ctrl_c: Callable[[], None], tmp_path: Path) -> None:
    with StopsJobs(tmp_path / "sweep") as stops:
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        assert stops.signum is None and not stops.file.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
