"""The panel with which a run is shown in a terminal."""

import io
from collections.abc import Iterator
from dataclasses import replace

import pytest
from console_cases import FIGURES, RUN, console, evaluation, step
from rich.console import Console as RichConsole

from dppo_cli.telemetry.console import Console
from dppo_cli.telemetry.listeners import Listeners
from dppo_cli.types import StepReport


@pytest.fixture
def panel(terminal: io.StringIO) -> Iterator[Console]:
    """A console whose panel is on the screen."""
    shown = console()
    shown.started(RUN)
    yield shown
    shown.finished(None)


def test_the_panel_shows_the_figures(panel: Console, terminal: io.StringIO) -> None:
    assert panel.live is not None
    panel.stepped(step(3))
    screen = io.StringIO()
    RichConsole(file=screen, width=100, color_system=None).print(panel._panel())
    for figure in FIGURES:
        assert figure in screen.getvalue()
    assert "3/6" in screen.getvalue() and "left" in screen.getvalue()
    panel.finished(None)
    # Live has drawn the same on the terminal, and no step has become a line.
    assert "reward 0.438" in terminal.getvalue()
    assert "step 3/6" not in terminal.getvalue()


def test_the_panel_says_how_much_time_is_left(panel: Console) -> None:
    (task,) = panel.progress.tasks
    assert task.fields["left"] == "-:--:--"
    for number in range(1, 4):
        panel.stepped(step(number))
    assert (task.completed, task.total) == (3, 6)
    assert task.fields["left"] == "0:00:14"  # three steps of 4.5 seconds


def test_the_panel_of_a_run_that_goes_on_begins_where_it_stopped(panel: Console, terminal: io.StringIO) -> None:
    panel.finished(None)
    panel.started(replace(RUN, step=4))
    (task,) = panel.progress.tasks
    assert (task.completed, task.total) == (4, 6)
    panel.stepped(step(5))
    assert task.completed == 5
    panel.finished(None)


def test_lines_appear_above_the_panel(panel: Console, terminal: io.StringIO) -> None:
    panel.evaluated(evaluation(1.0, group_sizes=(2,)))
    panel.warned("step 1: 50%")
    panel.finished(None)
    assert "step 0: 100.0%" in terminal.getvalue()
    assert "warning: step 1: 50%" in terminal.getvalue()
    assert panel.live is None


def test_the_panel_is_gone_after_an_error_of_the_run(panel: Console, terminal: io.StringIO) -> None:
    """Otherwise the cursor stays hidden and the next line lands in the middle of it."""
    panel.finished(None)
    assert panel.live is None and cursor_is_shown(terminal)


def test_the_panel_is_gone_after_an_error_of_its_own(panel: Console, terminal: io.StringIO) -> None:
    """By which the console stops hearing of the run, and so of its end."""
    listeners = Listeners([panel])
    listeners.stepped(StepReport({"step": 1}, [], []))
    assert listeners.listening == []
    assert panel.live is None and cursor_is_shown(terminal)


def cursor_is_shown(terminal: io.StringIO) -> bool:
    hide, show = "\x1b[?25l", "\x1b[?25h"
    return terminal.getvalue().rfind(show) > terminal.getvalue().rindex(hide)
