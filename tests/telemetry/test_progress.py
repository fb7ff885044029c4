"""Time left, curves and memory, and the phases that are no steps."""

import io
import json
import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dppo_cli.telemetry import phases, progress
from dppo_cli.telemetry.phases import phase
from dppo_cli.telemetry.progress import BARS, WIDTH, TimeLeft, curve, earlier_rewards, gpu_memory
from dppo_cli.telemetry.table import RichConsole
from dppo_cli.types import EvalReport, RunInfo

RUN = RunInfo(Path("runs/x"), 0, 10, "some/model", 20, 10, "cpu", "float32", "merged weights")
EVALUATION = EvalReport(0, "held_out", 0.25, None, None, [])


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress, "time", found)
    return found


def steps(left: TimeLeft, first: int, last: int, seconds: float) -> None:
    for number in range(first, last + 1):
        left.stepped({"step": number, "time": {"total": seconds}})


# Time left


def test_steps_and_the_evaluation_at_the_end_are_counted(clock: Clock) -> None:
    left = TimeLeft(every=0)
    left.started(RUN)
    assert left.seconds is None and str(left) == "-:--:--"
    clock.now += 30  # the evaluation before training takes as long as the one after it
    left.evaluated(EVALUATION)
    steps(left, 1, 4, seconds=5.0)
    assert left.seconds == 6 * 5 + 30 and str(left) == "0:01:00"
    steps(left, 5, 10, seconds=5.0)
    assert left.seconds == 30


def test_evaluations_in_between_are_counted_once_each(clock: Clock) -> None:
    left = TimeLeft(every=3)
    left.started(RUN)
    clock.now += 20
    left.evaluated(EVALUATION)
    clock.now += 40  # another set, which is evaluated at the start and at the end alone
    left.evaluated(replace(EVALUATION, name="math"))
    steps(left, 1, 2, seconds=5.0)
    assert left.seconds == 8 * 5 + 3 * 20 + 60  # after steps 3, 6 and 9
    # A step says what its own evaluation took, and its other seconds are those of a step.
    left.evaluated(replace(EVALUATION, step=3))
    left.stepped({"step": 3, "time": {"total": 15.0, "eval": 10.0}})
    assert left.seconds == 7 * 5 + 2 * 10 + 60
    steps(left, 4, 9, seconds=5.0)
    assert left.seconds == 1 * 5 + 60


def test_a_run_that_goes_on_counts_its_own_steps(clock: Clock) -> None:
    left = TimeLeft(every=0)
    left.started(replace(RUN, step=6))
    steps(left, 7, 8, seconds=2.0)
    assert left.seconds == 2 * 2


def test_only_the_last_steps_say_how_long_a_step_takes(clock: Clock) -> None:
    left = TimeLeft(every=0)
    left.started(replace(RUN, steps=1000))
    steps(left, 1, 50, seconds=100.0)
    steps(left, 51, 50 + progress.RECENT, seconds=1.0)
    assert left.seconds == 1000 - 50 - progress.RECENT


def test_a_run_that_only_a_signal_ends(clock: Clock) -> None:
    """So many steps are as many years as the system cannot count."""
    left = TimeLeft(every=0)
    left.started(replace(RUN, steps=2**63 - 1))
    steps(left, 1, 2, seconds=1.0)
    assert str(left) == "> 1000 days"
    left.started(replace(RUN, steps=1000 * 86400 + 2))
    steps(left, 1, 2, seconds=1.0)
    assert str(left) == "1000 days, 0:00:00"


# Curves and memory


def test_a_curve() -> None:
    assert curve([0.0, 0.5, 1.0]) == f"{BARS[0]}{BARS[4]}{BARS[7]} 0.000 -> 1.000"
    assert curve([0.25, 0.25]) == f"{BARS[0] * 2} 0.250 -> 0.250"


def test_a_long_curve_has_the_means_of_its_parts() -> None:
    values = [float(i // 100) for i in range(100 * WIDTH)]
    bars, first, _, last = curve(values).split()
    assert len(bars) == WIDTH and list(bars) == sorted(bars) and set(bars) == set(BARS)
    assert (first, last) == ("0.000", f"{WIDTH - 1:.3f}")
    assert len(curve(values[: WIDTH + 1]).split()[0]) == WIDTH


def test_earlier_rewards(tmp_path: Path) -> None:
    run = replace(RUN, run_dir=tmp_path)
    assert earlier_rewards(run) == []
    lines = [{"step": 1, "reward": 0.25}, {"step": 2, "reward": None}, {"step": 3, "reward": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert earlier_rewards(run) == [0.25, 0.5]
    (tmp_path / "metrics.jsonl").write_text("{")
    assert earlier_rewards(run) == []


def test_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (6 * 2**30, 24 * 2**30))
    assert gpu_memory() == "GPU memory 18.0 of 24.0 GiB"


# Phases


def lines(seconds: float, long: float, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a phase of so many seconds prints where there is no terminal, if one of `long` seconds is long."""
    monkeypatch.setattr(phases, "LONG", long)
    screen = io.StringIO()
    with phase("loading [the] model", RichConsole(file=screen, soft_wrap=True)):
        time.sleep(seconds)
    return screen.getvalue().splitlines()


def test_a_long_phase_is_a_line_at_its_begin_and_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    begins, ends = lines(0.5, 0.1, monkeypatch)
    assert begins == "loading [the] model ..."
    assert re.fullmatch(r"loading \[the\] model: \d+ s", ends)


def test_a_short_phase_is_no_line(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = threading.active_count()
    assert lines(0.0, 600.0, monkeypatch) == []
    # Nor is there anything left that would say one later.
    deadline = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_a_phase_that_fails_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "LONG", 0.05)
    screen = io.StringIO()

    def fail() -> None:
        with phase("loading", RichConsole(file=screen)):
            time.sleep(0.3)
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert screen.getvalue() == "loading ...\n"


def test_in_a_terminal_a_phase_is_a_spinner() -> None:
    screen = io.StringIO()
    with phase("loading [the] model", RichConsole(file=screen, force_terminal=True, color_system=None)):
        pass
    assert "loading [the] model" in screen.getvalue()
    assert screen.getvalue().endswith("\x1b[2K")  # and leaves nothing


def test_a_phase_outlives_what_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError("no space left")

    monkeypatch.setattr(phases, "LONG", 0.0)
    done = False
    with phase("loading", RichConsole(file=Full())):
        done = True
    assert done


def test_a_phase_of_a_command_is_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(phases, "LONG", 0.0)
    with phase("sampling"):
        pass
    captured = capsys.readouterr()
    assert captured.out == "" and re.search(r"^sampling: \d+ s$", captured.err, re.MULTILINE)
