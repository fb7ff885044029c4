"""What a user sees of a run when nobody watches: plain lines, and a table at the end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from console_cases import FIGURES, RUN, console, evaluation, step

from dppo_cli.telemetry.console import PLAIN_LINES, SHOWN
from dppo_cli.telemetry.listeners import Listeners
from dppo_cli.telemetry.table import print_table
from dppo_cli.telemetry.trust_region import TokenTally
from dppo_cli.telemetry.watch import Watch

SUMMARY: dict[str, Any] = {
    "evaluations": {
        "held_out": {
            "before": {"accuracy": 0.25, "interval": [0.125, 0.375]},
            "after": {"accuracy": 0.875, "interval": None},
            "difference": {"mean": 0.625, "interval": [0.5, 0.75], "problems": 8},
        },
        "math": {"before": {"accuracy": 0.5, "interval": None}, "after": None, "difference": None},
    },
    "steps": 6,
    "seconds": 12.4,
    "peak_memory_gib": 0.5,
    "adapter": "runs/x/adapter",
}


def rows(output: str) -> list[list[str]]:
    """Cells of a table's rows."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines()]


# Plain lines


def test_without_a_terminal_each_step_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console()
    shown.started(RUN)
    for number in range(1, 7):
        shown.stepped(step(number))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "some/model: 20 parameters, 10 trained, on cpu, float32"
    assert lines[1:3] == ["sampling from merged weights", "run folder: runs/x"]
    assert [line.split()[1] for line in lines[3:]] == [f"{number}/6" for number in range(1, 7)]
    for figure in FIGURES:
        assert figure in lines[5]
    # No escape codes, no carriage returns, no bars.
    assert not {"\x1b", "\r", "━"} & set("".join(lines))


def test_a_run_that_goes_on_says_after_which_step(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console()
    shown.started(replace(RUN, step=2))
    shown.stepped(step(3))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:4] == ["run folder: runs/x", "going on after step 2 of 6"]
    assert lines[4].startswith("step 3/6")


def test_a_long_run_says_about_twenty_lines(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console()
    shown.started(replace(RUN, steps=1000))
    for number in range(1, 1001):
        shown.stepped(step(number))
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(steps) == PLAIN_LINES + 1
    assert (steps[0], steps[1], steps[-1]) == ("1/1000", "50/1000", "1000/1000")


def test_figures_that_there_are_none_of(capsys: pytest.CaptureFixture[str]) -> None:
    """A step whose samples were all skipped has no divergence to show, and one without a judged sample no reward."""
    nothing = dict.fromkeys(("reward", "accuracy", "entropy", "shift_mean", "masked_positive", "masked_negative"))
    shown = console()
    shown.started(RUN)
    shown.stepped(step(1, **nothing, mismatch_mean=None))
    line = capsys.readouterr().out.splitlines()[-1]
    assert "reward -" in line and "|pi-mu| -" in line and "masked A>0 - A<0 -" in line


def test_an_evaluation_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Of all samples, however they are grouped."""
    console().evaluated(evaluation(0.25, group_sizes=(1, 3)))
    console().evaluated(evaluation(0.25, group_sizes=(2,), name="aime"))
    console().evaluated(replace(evaluation(0.25, group_sizes=(2,)), accuracy=None, interval=None))
    assert capsys.readouterr().out.splitlines() == [
        "step 0: 25.0% (95% interval 12.5 to 50.0%) of 4 held-out samples right",
        "step 0: 25.0% (95% interval 12.5 to 50.0%) of 2 aime samples right",
        "step 0: no held-out sample was judged",
    ]


def test_what_the_watch_finds_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console()
    listeners = Listeners([Watch(masks=True, warn=lambda text: listeners.warned(text)), shown])
    listeners.started(RUN)
    listeners.warned("divergence.delta_high=0.9")
    listeners.stepped(step(1, masked_positive=0.5))
    listeners.stepped(step(2, masked_positive=0.5))
    output = capsys.readouterr().out
    assert output.count("warning: divergence.delta_high=0.9") == 1
    assert output.count("warning: step 1: 50%") == 1 and "warning: step 2" not in output


def test_text_with_brackets_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """rich would read [red] as a colour."""
    shown = console(**{"[red]x[/red]": TokenTally(seen=1, masked=1)})
    shown.started(replace(RUN, model="[0.9] [red]x[/red]", run_dir=Path("[bold]")))
    shown.warned("[bold]")
    shown.finished({**SUMMARY, "adapter": "[red]x[/red]/adapter"})
    output = capsys.readouterr().out
    assert "[0.9] [red]x[/red]: 20 parameters" in output and "run folder: [bold]\n" in output
    assert "warning: [bold]\n" in output
    assert "'[red]x[/red]'" in output and "[red]x[/red]/adapter" in output


# The end


def test_the_end_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console(**{" 7": TokenTally(340, 12, mu_sum=3.0, pi_sum=6.0), "\n": TokenTally(9, 2, 0.25, 0.0)})
    shown.masked.tallies[1, -1] = shown.masked.tallies.pop((1, 1))
    shown.started(RUN)
    shown.finished(SUMMARY)
    found = rows(capsys.readouterr().out)
    assert ["' 7'", "+", "12", "340", "0.250", "0.500"] in found
    assert ["'\\n'", "-", "2", "9", "0.125", "0.000"] in found
    for row in (
        ["accuracy before", "25.0% (95% interval 12.5 to 37.5%)"],
        ["accuracy after", "87.5%"],
        ["difference", "+62.5 points (95% interval +50.0 to +75.0)"],
        ["accuracy before, math", "50.0%"],
        ["accuracy after, math", "not measured"],
        ["steps", "6 of 6"],
        ["seconds", "12"],
        ["peak memory", "0.50 GiB"],
        ["adapter", "runs/x/adapter"],
    ):
        assert row in found


def test_only_the_tokens_masked_most_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console(**{f"t{n:02}": TokenTally(99, 50 - n) for n in range(SHOWN + 5)})
    shown.started(RUN)
    shown.finished(SUMMARY)
    found = [row[0] for row in rows(capsys.readouterr().out) if len(row) == 6 and row[0].startswith("'t")]
    assert found == [f"'t{n:02}'" for n in range(SHOWN)]


def test_the_end_of_an_interrupted_run(capsys: pytest.CaptureFixture[str]) -> None:
    shown = console()
    shown.started(RUN)
    shown.finished({**SUMMARY, "steps": 2})
    output = capsys.readouterr().out
    assert "not measured" in output and "2 of 6" in output
    assert "masked most" not in output


def test_a_run_without_a_summary_has_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    """It ended by an error, which is told elsewhere; or it never began."""
    console().finished(None)
    shown = console(a=TokenTally(1, 1))
    shown.started(RUN)
    shown.finished(None)
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_long_path_is_shown_whole(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    path = "/".join(f"folder{i}" for i in range(12))
    print_table("export", [("written to", path), ("size", "1 MiB")])
    cells = [line.strip("│").split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert "".join(cells) == f"{path}1 MiB"
