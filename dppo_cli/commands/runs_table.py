"""The table of `dppo runs`, whose columns fit the terminal."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.measure import Measurement
from rich.table import Column, Table

from dppo_cli.config.checks import visible
from dppo_cli.telemetry.table import RichConsole, age, size

RUNNING, FINISHED, STOPPED, KILLED, FAILED, BROKEN = "running", "finished", "stopped", "killed", "failed", "broken"
COLOURS = {RUNNING: "cyan", FINISHED: "green", STOPPED: "yellow", KILLED: "yellow", FAILED: "red", BROKEN: "red"}
LEAST = 3
"""Columns that are shown however narrow the terminal is; of the others, those that there is room for."""
PIPE_WIDTH = 200
"""Columns of the table where there is no terminal to fit."""


@dataclass(frozen=True)
class Row:
    """A run. None: not known. `problem`: why it is broken, or why a job of a sweep failed."""

    run: str
    state: str
    step: int | None
    steps: int | None
    accuracy_before: float | None
    accuracy_after: float | None
    changed: float  # seconds since 1970
    bytes: int
    model: str | None
    method: str | None
    problem: str | None


def print_runs(folder: Path, rows: Sequence[Row], total: int) -> None:
    """A table with as many columns as there is room for. `total`: runs in the folder."""
    console = RichConsole(highlight=False)
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    if not rows:
        console.print(f"there are no runs in {visible(str(folder))}", markup=False)
        return
    columns = [
        ("run", [_shown(row.run) for row in rows]),
        ("state", [f"[{COLOURS[row.state]}]{row.state}[/]" for row in rows]),
        ("step", [f"{_or_dash(row.step)} of {_or_dash(row.steps)}" for row in rows]),
        ("accuracy", [_accuracy(row) for row in rows]),
        ("age", [age(time.time() - row.changed) for row in rows]),
        ("size", [size(row.bytes) for row in rows]),
        ("model", [_shown(row.model or "-") for row in rows]),
        ("method", [_shown(row.method or "-") for row in rows]),
    ]
    while not (fits := _width(columns, console) <= console.width) and len(columns) > LEAST:
        columns.pop()
    for n, row in enumerate(rows):  # Of any length, so they are folded.
        columns[1][1][n] += f"\n{_shown(row.problem)}" if row.problem else ""
    console.print(_table(columns, whole=fits))
    if len(rows) < total:
        console.print(f"{len(rows)} of {total} runs; limit=null shows all")


def _width(columns: Sequence[tuple[str, Sequence[str]]], console: RichConsole) -> int:
    """Of the table, if nothing is folded."""
    return Measurement.get(console, console.options.update(max_width=sys.maxsize), _table(columns)).maximum


def _table(columns: Sequence[tuple[str, Sequence[str]]], *, whole: bool = False) -> Table:
    """`whole`: nothing is folded but what is said of a state."""
    longest = max(map(len, COLOURS)) if whole else None
    heads = [
        Column(name, overflow="fold", no_wrap=whole and name != "state", min_width=longest if name == "state" else None)
        for name, _ in columns
    ]
    table = Table(*heads)
    for cells in zip(*(cells for _, cells in columns), strict=True):
        table.add_row(*cells)
    return table


def _shown(text: str) -> str:
    return escape(visible(text))


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _accuracy(row: Row) -> str:
    """Before and after training. Example: 29.6% -> 97.4%."""
    known = (row.accuracy_before, row.accuracy_after)
    return "-" if known == (None, None) else " -> ".join(map(_share, known))


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"
