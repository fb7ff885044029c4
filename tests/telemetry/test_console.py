"""What a user sees of a run: plain lines when nobody watches, a panel with the same figures in a terminal."""

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole

from dppo_cli.config import TrainConfig
from dppo_cli.evaluate import Evaluation
from dppo_cli.telemetry.console import PLAIN_LINES, Console
from dppo_cli.telemetry.table import print_table

METRICS: dict[str, Any] = {
    "step": 3,
    "reward": 0.4375,
    "accuracy": 0.25,
    "entropy": 1.2345,
    "shift_mean": 0.01234,
    "mismatch_mean": 1e-6,
    "masked_positive": 0.031,
    "masked_negative": 0.052,
    "skipped": 0.4,
    "padding": 0.07,
    "time": {"rollout": 1.25, "reward": 0.5, "update": 2.75, "sync": 0.01, "total": 4.5, "tokens_per_second": 4321.0},
}
FIGURES = [
    "reward 0.438",
    "accuracy 25.0%",
    "entropy 1.234",
    "|pi-mu| 0.0123",
    "masked A>0 3.10% A<0 5.20%",
    "4321 tokens/s",
    "rollout 1.25 reward 0.50 update 2.75",
]
"""What the issue asks for, as METRICS has it; time left and progress belong to the panel alone."""
SUMMARY: dict[str, Any] = {
    "eval_before": 0.25,
    "eval_after": 0.875,
    "steps": 6,
    "seconds": 12.4,
    "peak_memory_gib": 0.5,
    "adapter": "runs/x/adapter",
}


class FakePolicy:
    parameters = (torch.zeros(10),)
    model = torch.nn.Linear(4, 5, bias=False)
    path = "some/model"
    device = torch.device("cpu")
    dtype = torch.float32


@pytest.fixture
def console(train_config: Callable[..., TrainConfig]) -> Callable[..., Console]:
    def made(*overrides: str) -> Console:
        return Console(train_config("steps=6", *overrides), FakePolicy(), Path("runs/x"))  # type: ignore[arg-type]

    return made


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Makes consoles believe they write to a terminal of 100 columns."""
    screen = io.StringIO()

    def rich(file: Any = None, **options: Any) -> RichConsole:
        return RichConsole(file=screen, force_terminal=True, width=100, color_system=None, **options)

    monkeypatch.setattr("dppo_cli.telemetry.console.RichConsole", rich)
    return screen


def metrics(step: int, **changes: Any) -> dict[str, Any]:
    return {**METRICS, "step": step, **changes}


def evaluation(rewards: list[float]) -> Evaluation:
    return Evaluation([None] * len(rewards), rewards, 1, 1.0)  # type: ignore[list-item]


# Plain lines


def test_without_a_terminal_each_step_is_a_line(
    console: Callable[..., Console], capsys: pytest.CaptureFixture[str]
) -> None:
    with console() as shown:
        for step in range(1, 7):
            shown.stepped(metrics(step))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "some/model: 20 parameters, 10 trained, on cpu, float32"
    assert lines[1] == "run folder: runs/x"
    assert [line.split()[1] for line in lines[2:]] == [f"{step}/6" for step in range(1, 7)]
    for figure in FIGURES:
        assert figure in lines[4]
    # No escape codes, no carriage returns, no bars.
    assert not {"\x1b", "\r", "━"} & set("".join(lines))


def test_a_long_run_says_about_twenty_lines(
    console: Callable[..., Console], capsys: pytest.CaptureFixture[str]
) -> None:
    with console("steps=1000") as shown:
        for step in range(1, 1001):
            shown.stepped(metrics(step))
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(steps) == PLAIN_LINES + 1
    assert (steps[0], steps[1], steps[-1]) == ("1/1000", "50/1000", "1000/1000")


def test_figures_that_there_are_none_of(console: Callable[..., Console], capsys: pytest.CaptureFixture[str]) -> None:
    """A step whose samples were all skipped has no divergence to show, and one without a judged sample no reward."""
    nothing = dict.fromkeys(("reward", "accuracy", "entropy", "shift_mean", "masked_positive", "masked_negative"))
    with console() as shown:
        shown.stepped(metrics(1, **nothing, mismatch_mean=None))
    line = capsys.readouterr().out.splitlines()[-1]
    assert "reward -" in line and "|pi-mu| -" in line and "masked A>0 - A<0 -" in line


def test_an_evaluation_is_a_line(console: Callable[..., Console], capsys: pytest.CaptureFixture[str]) -> None:
    with console() as shown:
        assert shown.evaluated(0, evaluation([1.0, 0.0, 0.0, 0.0])).accuracy == 0.25
    assert capsys.readouterr().out.splitlines()[-1] == "step 0: 25.0% ± 25.0% of 4 held-out samples right"
    assert shown.accuracy == [(0, 0.25)]


def test_warnings_are_shown_and_kept(console: Callable[..., Console], capsys: pytest.CaptureFixture[str]) -> None:
    with console("divergence.delta_high=0.9") as shown:
        shown.stepped(metrics(1, masked_positive=0.5))
        shown.stepped(metrics(2, masked_positive=0.5))
    output = capsys.readouterr().out
    assert output.count("warning: divergence.delta_high=0.9") == 1
    assert output.count("warning: step 1: 50%") == 1 and "warning: step 2" not in output
    assert len(shown.warnings) == 2


def test_text_with_brackets_is_shown_as_it_is(
    console: Callable[..., Console], capsys: pytest.CaptureFixture[str]
) -> None:
    """rich would read [red] as a colour."""
    console().say("betas=[0.9] [red]x[/red]")
    console().warn("[bold]")
    output = capsys.readouterr().out
    assert "betas=[0.9] [red]x[/red]\n" in output and "warning: [bold]\n" in output


def test_the_end_is_a_table(console: Callable[..., Console], capsys: pytest.CaptureFixture[str]) -> None:
    masked = [
        {"token": 5, "text": " 7", "advantage": "+", "masked": 12, "seen": 340, "mean_mu": 0.25, "mean_pi": 0.5},
        {"token": 6, "text": "\n", "advantage": "-", "masked": 2, "seen": 9, "mean_mu": 0.125, "mean_pi": 0.0},
    ]
    console().finished(SUMMARY, masked)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in capsys.readouterr().out.splitlines()]
    assert ["' 7'", "+", "12", "340", "0.250", "0.500"] in rows
    assert ["'\\n'", "-", "2", "9", "0.125", "0.000"] in rows
    for row in (
        ["accuracy before", "25.0%"],
        ["accuracy after", "87.5%"],
        ["steps", "6 of 6"],
        ["seconds", "12"],
        ["peak memory", "0.50 GiB"],
        ["adapter", "runs/x/adapter"],
    ):
        assert row in rows


def test_the_end_of_an_interrupted_run(console: Callable[..., Console], capsys: pytest.CaptureFixture[str]) -> None:
    shown = console()
    shown.interrupted(0)
    shown.interrupted(2)
    shown.finished({**SUMMARY, "steps": 2, "eval_after": None}, [])
    output = capsys.readouterr().out
    assert "interrupted: no step was finished, nothing is saved\n" in output
    assert "interrupted: saving the adapter as it is after step 2\n" in output
    assert "not measured" in output and "2 of 6" in output
    assert "masked most" not in output


def test_a_long_path_is_shown_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/".join(f"folder{i}" for i in range(12))
    print_table("export", [("written to", path), ("size", "1 MiB")])
    cells = [line.strip("│").split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "".join(cells) == f"{path}1 MiB"


# The panel


def test_the_panel_shows_the_figures_of_the_issue(console: Callable[..., Console], terminal: io.StringIO) -> None:
    shown = console()
    assert shown.live is not None
    with shown:
        shown.stepped(metrics(3))
        screen = io.StringIO()
        RichConsole(file=screen, width=100, color_system=None).print(shown._panel())
        panel = screen.getvalue()
    for figure in FIGURES:
        assert figure in panel
    assert "3/6" in panel and "left" in panel
    # Live has drawn the same on the terminal, and no step has become a line.
    assert "reward 0.438" in terminal.getvalue()
    assert "step 3/6" not in terminal.getvalue()


def test_the_panel_says_how_much_time_is_left(console: Callable[..., Console], terminal: io.StringIO) -> None:
    with console() as shown:
        task = shown.progress.tasks[0]
        clock = iter(range(0, 1000, 10))
        shown.progress.get_time = partial(next, clock)  # type: ignore[assignment]
        shown.progress.reset(shown.bar)
        for step in range(1, 4):
            shown.stepped(metrics(step))
        assert task.completed == 3 and task.total == 6
        assert task.time_remaining is not None and task.time_remaining > 0


def test_lines_stand_above_the_panel(console: Callable[..., Console], terminal: io.StringIO) -> None:
    with console() as shown:
        shown.evaluated(0, evaluation([1.0, 1.0]))
        shown.stepped(metrics(1, masked_positive=0.5))
    assert "step 0: 100.0%" in terminal.getvalue()
    assert "warning: step 1: 50%" in terminal.getvalue()
    assert shown.live is None


def test_the_panel_is_gone_after_an_error(console: Callable[..., Console], terminal: io.StringIO) -> None:
    """Otherwise the cursor stays hidden and the next line lands in the middle of it."""
    shown = console()
    with pytest.raises(KeyError), shown:
        shown.stepped({"step": 1})
    assert shown.live is None
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert terminal.getvalue().rindex(show) > terminal.getvalue().rindex(hide)
