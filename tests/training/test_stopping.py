"""Signals: the first asks, grace has an end, the second stops at once, and nothing is left of it afterwards."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import make
import pytest

from dppo_cli.errors import Stopped
from dppo_cli.training.stopping import STOPPING, Stopping

LONG = 60.0
"""Seconds of grace that no test waits for."""
HEARD = [*STOPPING, signal.SIGUSR1, signal.SIGALRM]


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    """Handlers and timer after each test are those before it. No signal is ignored, as under nohup some would be."""
    outside = {signum: signal.signal(signum, signal.SIG_DFL) for signum in HEARD}
    before = handlers()
    try:
        yield
        assert handlers() == before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    finally:
        for signum, handler in outside.items():
            signal.signal(signum, handler)


def handlers() -> dict[int, Any]:
    return {signum: signal.getsignal(signum) for signum in HEARD}


def send(signum: int) -> None:
    """To this process. Python runs handlers between two instructions, so give it some."""
    os.kill(os.getpid(), signum)
    time.sleep(0.01)


def stopped_in(step: Callable[[Stopping], Any], grace: float = LONG) -> Stopped:
    """What stops a step."""
    with Stopping(grace, lambda _: None) as stopping, pytest.raises(Stopped) as raised:
        step(stopping)
    return raised.value


# The first one asks


@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_the_first_signal_asks_and_says_so(signum: signal.Signals, status: int) -> None:
    said: list[str] = []
    with Stopping(LONG, said.append) as stopping:
        stopping.check()
        send(signum)
        assert said == [f"{signum.name}: stopping after this step, within 60 seconds; once more to stop at once"]
        with pytest.raises(Stopped) as raised:
            stopping.check()
    assert (raised.value.signum, raised.value.exit_status) == (signum, status)


def test_nothing_else_handles_it() -> None:
    """An `except Exception` around a step, a listener or a reward must not."""
    assert not issubclass(Stopped, Exception)


def test_without_a_signal_nothing_happens() -> None:
    with Stopping(LONG, make.fail) as stopping:
        stopping.check()
        with stopping.shielded():
            pass
        assert not stopping.wants_checkpoint


def test_sigusr1_asks_for_a_checkpoint_and_stops_nothing() -> None:
    with Stopping(LONG, make.fail) as stopping:
        for _ in range(3):
            send(signal.SIGUSR1)
        assert stopping.wants_checkpoint
        stopping.check()


# In the middle of a step


@pytest.mark.parametrize("grace", [0.05, 0.0])
def test_grace_runs_out_in_the_middle_of_a_step(grace: float) -> None:
    def step(stopping: Stopping) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LONG)

    started = time.perf_counter()
    assert stopped_in(step, grace).exit_status == 143
    assert grace <= time.perf_counter() - started < 5


def test_a_step_that_ends_within_grace_is_not_interrupted() -> None:
    events = []

    def step(stopping: Stopping) -> None:
        send(signal.SIGTERM)
        time.sleep(0.05)
        events.append("ended")
        stopping.check()

    stopped_in(step, grace=5.0)
    assert events == ["ended"]


@pytest.mark.parametrize("second", STOPPING, ids=str)
def test_a_second_signal_stops_at_once(second: int) -> None:
    """It may be another one; the status is that of the first."""

    def step(stopping: Stopping) -> None:
        send(signal.SIGINT)
        os.kill(os.getpid(), second)
        time.sleep(LONG)

    started = time.perf_counter()
    assert stopped_in(step).exit_status == 130
    assert time.perf_counter() - started < 5


def test_a_third_signal_is_the_systems() -> None:
    """Even where nothing may be interrupted: a save that hangs can be ended."""
    code = (
        "import os, signal, sys\n"
        "from dppo_cli.training.stopping import Stopping\n"
        "with Stopping(60.0, print) as stopping, stopping.shielded():\n"
        "    for _ in range(2):\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('shielded', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached', flush=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGTERM, done.stderr
    assert done.stdout.splitlines() == ["shielded"]


# What is not interrupted


def test_a_shield_defers_what_would_stop_at_once() -> None:
    events: list[str] = []

    def step(stopping: Stopping) -> None:
        send(signal.SIGHUP)
        with stopping.shielded():
            with stopping.shielded():
                send(signal.SIGHUP)
                events.append("inner")
            events.append("outer")
        events.append("never")

    assert stopped_in(step).exit_status == 129
    assert events == ["inner", "outer"]


def test_a_shield_defers_the_end_of_grace() -> None:
    events: list[str] = []

    def step(stopping: Stopping) -> None:
        with stopping.shielded():
            send(signal.SIGTERM)
            time.sleep(0.1)
            events.append("written")
        events.append("never")

    assert stopped_in(step, grace=0.01).exit_status == 143
    assert events == ["written"]


def test_a_first_signal_in_a_shield_only_asks() -> None:
    """And is told of when the shield ends: within, a line may be half printed."""
    told: list[str] = []
    with Stopping(LONG, told.append) as stopping:
        with stopping.shielded():
            with stopping.shielded():
                send(signal.SIGTERM)
            assert told == []
        assert len(told) == 1 and told[0].startswith("SIGTERM: stopping after this step")
        with stopping.shielded():
            went_on = True
        assert len(told) == 1
        with pytest.raises(Stopped):
            stopping.check()
    assert went_on


def test_a_failure_in_a_shield_is_told_rather_than_the_stop() -> None:

    def save(stopping: Stopping) -> None:
        with stopping.shielded():
            send(signal.SIGTERM)
            raise OSError(28, "No space left on device")

    with Stopping(LONG, lambda _: None) as stopping:
        send(signal.SIGTERM)
        with pytest.raises(OSError, match="No space"):
            save(stopping)


# Afterwards, and elsewhere


@pytest.mark.parametrize("sent", [0, 1, 2])
def test_afterwards_signals_do_what_they_did(sent: int) -> None:
    """The fixture compares all handlers; here is one that is heard."""
    heard: list[int] = []

    def step(stopping: Stopping) -> None:
        for _ in range(sent):
            send(signal.SIGTERM)
        raise Stopped(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda signum, frame: heard.append(signum))
    try:
        stopped_in(step)
        assert heard == []
        send(signal.SIGTERM)
        assert heard == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup dppo train`: the run outlives its terminal."""

    def step(stopping: Stopping) -> None:
        for _ in range(3):
            send(signal.SIGHUP)
        stopping.check()
        for _ in range(2):
            send(signal.SIGTERM)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stopped_in(step).exit_status == 143
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_in_another_thread_nothing_happens() -> None:
    """As under a launcher with threads: Python lets only the main thread hear signals."""
    seen: list[Any] = []

    def job() -> None:
        before = handlers()
        with Stopping(LONG, make.fail) as stopping:
            stopping.check()
            with stopping.shielded():
                seen.append(handlers() == before)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert seen == [True]


def test_what_stopped_a_run_reaches_other_processes() -> None:
    """Launchers pickle it."""
    again = pickle.loads(pickle.dumps(Stopped(15, "the state is saved")))
    assert (again.signum, again.exit_status, str(again)) == (15, 143, "the state is saved")
