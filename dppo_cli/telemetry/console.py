"""What a user sees while it runs: a live panel in a terminal, plain lines elsewhere."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dppo_cli.telemetry.table import RichConsole, print_table, with_interval
from dppo_cli.telemetry.trust_region import MaskedTokens
from dppo_cli.training.evaluation import HELD_OUT
from dppo_cli.types import EvalReport, RunInfo, StepReport

PLAIN_LINES = 20
"""Steps reported in a run whose output is not a terminal, besides the first and the last."""
SHOWN = 10
"""Tokens in the table at the end."""


class Console:
    """A listener that shows a training run. `masked`: whose table is shown at the end."""

    def __init__(self, masked: MaskedTokens) -> None:
        self.masked = masked
        self.rich = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self.steps = 0
        self.last: Mapping[str, Any] = {}
        self.progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = self.progress.add_task("train", total=None)
        self.live: Live | None = None

    def started(self, run: RunInfo) -> None:
        self.steps = run.steps
        self._say(
            f"{run.model}: {run.parameters:,} parameters, {run.trained_parameters:,} trained, on {run.device}, "
            f"{run.dtype}"
        )
        self._say(f"sampling from {run.samples_with}")
        self._say(f"run folder: {run.run_dir}")
        if run.step:
            self._say(f"going on after step {run.step} of {run.steps}")
        self.progress.reset(self.bar, total=run.steps, completed=run.step)
        if self.rich.is_terminal:
            self.live = Live(self._panel(), console=self.rich, refresh_per_second=4)
            self.live.start()

    def evaluated(self, report: EvalReport) -> None:
        samples = sum(len(group.completions) for group in report.groups)
        of = "held-out" if report.name == HELD_OUT else report.name
        self._say(
            f"step {report.step}: {with_interval(report.accuracy, report.interval)} of {samples} {of} samples right"
        )

    def stepped(self, report: StepReport) -> None:
        metrics = self.last = report.metrics
        self.progress.update(self.bar, completed=metrics["step"])
        if self.live:
            self.live.update(self._panel())
        elif metrics["step"] % max(1, self.steps // PLAIN_LINES) == 0 or metrics["step"] in (1, self.steps):
            self._say(self._line(metrics))

    def warned(self, text: str) -> None:
        self.rich.print(f"warning: {text}", style="yellow", markup=False)

    def finished(self, summary: Mapping[str, Any] | None) -> None:
        self._stop()
        if summary is None:
            return
        rows = self.masked.rows(SHOWN)
        if rows:
            table = Table(
                "token", "A", "masked", "of", "mean mu", "mean pi", title="tokens the trust region masked most"
            )
            for row in rows:
                text, share = repr(row["text"]), f"{row['mean_mu']:.3f}"
                table.add_row(
                    escape(text), row["advantage"], str(row["masked"]), str(row["seen"]), share, f"{row['mean_pi']:.3f}"
                )
            self.rich.print(table)
        print_table(
            "train",
            [
                *(row for name, found in summary["evaluations"].items() for row in _evaluation(name, found)),
                ("steps", f"{summary['steps']} of {self.steps}"),
                ("seconds", f"{summary['seconds']:.0f}"),
                ("peak memory", f"{summary['peak_memory_gib']:.2f} GiB"),
                ("adapter", summary["adapter"]),
            ],
            self.rich,
        )

    def _say(self, text: str) -> None:
        self.rich.print(text, markup=False)

    def _stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def _panel(self) -> Group:
        table = Table.grid(padding=(0, 2))
        if self.last:
            for row in _cells(self.last):
                table.add_row(*row)
        return Group(self.progress, table)

    def _line(self, metrics: Mapping[str, Any]) -> str:
        cells = [cell for row in _cells(metrics) for cell in row]
        return f"step {metrics['step']}/{self.steps}  " + "  ".join(cells)


def _evaluation(name: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What an evaluation before and after training says of one set, with 95% intervals."""
    of = "" if name == HELD_OUT else f", {name}"
    rows = []
    for when in ("before", "after"):
        measured = found[when] or {"accuracy": None, "interval": None}
        rows.append((f"accuracy {when}{of}", with_interval(measured["accuracy"], measured["interval"])))
    if (difference := found["difference"]) is not None:
        rows.append((f"difference{of}", with_interval(difference["mean"], difference["interval"], sign="+")))
    return rows


def _cells(m: Mapping[str, Any]) -> list[list[str]]:
    """The figures of a step, a row per theme."""
    seconds = " ".join(f"{name} {m['time'][name]:.2f}" for name in ("rollout", "reward", "update") if name in m["time"])
    return [
        [
            f"reward {_show(m['reward'], '.3f')}",
            f"accuracy {_show(m['accuracy'], '.1%')}",
            f"entropy {_show(m['entropy'], '.3f')}",
        ],
        [
            f"|pi-mu| {_show(m['shift_mean'], '.4f')}",
            f"masked A>0 {_show(m['masked_positive'], '.2%')} A<0 {_show(m['masked_negative'], '.2%')}",
        ],
        [
            f"{m['time']['tokens_per_second']:.0f} tokens/s",
            f"seconds: {seconds}",
            f"skipped {m['skipped']:.0%} padding {m['padding']:.0%}",
        ],
    ]


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
