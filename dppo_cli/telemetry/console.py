"""What a user sees while it runs: a live panel in a terminal, plain lines elsewhere, JSON for other programs."""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dppo_cli.telemetry.phases import phase
from dppo_cli.telemetry.progress import TimeLeft, curve, earlier_rewards, gpu_memory
from dppo_cli.telemetry.table import RichConsole, points, print_table, with_interval
from dppo_cli.telemetry.trust_region import MaskedTokens
from dppo_cli.training.evaluation import HELD_OUT
from dppo_cli.types import EvalReport, RunInfo, StepReport

PLAIN_LINES = 20
"""Steps reported in a run whose output is not a terminal, besides the first and the last."""
SHOWN = 10
"""Tokens in the table at the end."""
MODES = ("auto", "plain", "quiet", "json")


def make_console(mode: str, masked: MaskedTokens, eval_every: int) -> "Console | JsonConsole":
    return JsonConsole() if mode == "json" else Console(masked, mode, eval_every)


class Console:
    """A listener that shows a training run. `masked`: whose table is shown at the end.

    `mode`: auto (a panel in a terminal, lines elsewhere), plain (lines), or quiet (warnings, and the table at the end).
    """

    def __init__(self, masked: MaskedTokens, mode: str = "auto", eval_every: int = 0) -> None:
        self.masked, self.mode, self.left = masked, mode, TimeLeft(eval_every)
        self.rewards: list[float] = []
        self.accuracies: list[float] = []
        self.on_gpu = False
        self.doing: str | None = None  # beside the steps, in the panel
        self.rich = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self.steps = 0
        self.last: Mapping[str, Any] = {}
        self.progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left {task.fields[left]}"),
        )
        self.bar = self.progress.add_task("train", total=None, left="-:--:--")
        self.live: Live | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Around what takes long and is no step."""
        if self.mode == "quiet":
            yield
        elif self.live is None:
            with phase(name, self.rich, spinner=self.mode == "auto"):
                yield
        else:
            self._does(name)
            try:
                yield
            finally:
                self._does(None)

    def started(self, run: RunInfo) -> None:
        self.steps = run.steps
        self.on_gpu = run.device.startswith("cuda")
        self.left.started(run)
        self.rewards = earlier_rewards(run) if run.step else []
        self._say(
            f"{run.model}: {run.parameters:,} parameters, {run.trained_parameters:,} trained, on {run.device}, "
            f"{run.dtype}"
        )
        self._say(f"sampling from {run.samples_with}")
        self._say(f"run folder: {run.run_dir}")
        if run.step:
            self._say(f"going on after step {run.step} of {run.steps}")
        self.progress.reset(self.bar, total=run.steps, completed=run.step)
        if self.rich.is_terminal and self.mode == "auto":
            self.live = Live(self._panel(), console=self.rich, refresh_per_second=4)
            self.live.start()

    def evaluated(self, report: EvalReport) -> None:
        samples = sum(len(group.completions) for group in report.groups)
        self.left.evaluated(report)
        if report.name == HELD_OUT and report.accuracy is not None:
            self.accuracies.append(report.accuracy)
        of = "held-out" if report.name == HELD_OUT else report.name
        right = f"{with_interval(report.accuracy, report.interval)} of {samples} {of} samples right"
        self._say(f"step {report.step}: {right if report.accuracy is not None else f'no {of} sample was judged'}")

    def stepped(self, report: StepReport) -> None:
        metrics = self.last = report.metrics
        if metrics["reward"] is not None:
            self.rewards.append(metrics["reward"])
        self.left.stepped(metrics)
        self.progress.update(self.bar, completed=metrics["step"], left=str(self.left))
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
        if self.mode != "quiet":
            self.rich.print(text, markup=False)

    def _does(self, name: str | None) -> None:
        self.doing = name
        if self.live:
            self.live.update(self._panel())

    def _stop(self) -> None:
        if self.live:
            self.live.stop()
            self.live = None

    def _panel(self) -> Group:
        table = Table.grid(padding=(0, 2))
        if self.last:
            for row in _cells(self.last):
                table.add_row(*row)
        lines = [f"reward   {curve(self.rewards)}"] if len(self.rewards) > 1 else []
        lines += [f"held-out {curve(self.accuracies)}"] if len(self.accuracies) > 1 else []
        lines += [gpu_memory()] if self.on_gpu else []
        lines += [f"{self.doing} ..."] if self.doing else []
        return Group(self.progress, table, *map(escape, lines))

    def _line(self, metrics: Mapping[str, Any]) -> str:
        cells = [cell for row in _cells(metrics) for cell in row]
        return f"step {metrics['step']}/{self.steps}  " + "  ".join([*cells, f"left {self.left}"])


class JsonConsole:
    """A listener that prints one JSON object for each event, and nothing else."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        with suppress(OSError):  # What listens is not part of the run.
            self._put("phase", name=name, state="begins")
        yield
        with suppress(OSError):
            self._put("phase", name=name, state="ends", seconds=time.monotonic() - began)

    def started(self, run: RunInfo) -> None:
        self._put("started", **{**asdict(run), "run_dir": str(run.run_dir)})

    def evaluated(self, report: EvalReport) -> None:
        samples = sum(len(group.completions) for group in report.groups)
        figures = {name: getattr(report, name) for name in ("step", "name", "accuracy", "standard_error", "interval")}
        self._put("evaluated", **figures, samples=samples)

    def stepped(self, report: StepReport) -> None:
        self._put("stepped", metrics=report.metrics)

    def warned(self, text: str) -> None:
        self._put("warned", text=text)

    def finished(self, summary: Mapping[str, Any] | None) -> None:
        self._put("finished", summary=summary)

    def _put(self, event: str, **said: Any) -> None:
        print(json.dumps({"event": event, **said}), flush=True)


def _evaluation(name: str, found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What an evaluation before and after training says of one set, with 95% intervals."""
    of = "" if name == HELD_OUT else f", {name}"
    rows = []
    for when in ("before", "after"):
        measured = found[when] or {"accuracy": None, "interval": None}
        rows.append((f"accuracy {when}{of}", with_interval(measured["accuracy"], measured["interval"])))
    if (difference := found["difference"]) is not None:
        rows.append((f"difference{of}", points(difference["mean"], difference["interval"])))
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
            *([f"filtered {m['filtered']:.2%}"] if m.get("filtered") else []),
            *([f"turns {m['turns']:.2f}"] if m.get("reply_tokens") else []),
        ],
        [
            f"{m['time']['tokens_per_second']:.0f} tokens/s",
            f"seconds: {seconds}",
            f"skipped {m['skipped']:.0%} padding {m['padding']:.0%}",
        ],
    ]


def _show(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
