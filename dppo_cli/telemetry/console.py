"""What a user sees while it runs: a live panel in a terminal, plain lines elsewhere."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dppo_cli.algorithm.objective import DRPO, PolicyGradient
from dppo_cli.config import TrainConfig
from dppo_cli.policy.policy import Policy
from dppo_cli.telemetry.table import print_table
from dppo_cli.telemetry.watch import Watch

if TYPE_CHECKING:
    from dppo_cli.evaluate import Evaluation

PLAIN_LINES = 20
"""Steps reported in a run whose output is no terminal, besides the first and the last."""


class Console:
    """Shows a training run. `warnings`: everything it warned of, in words."""

    def __init__(self, config: TrainConfig, policy: Policy, run_dir: Path) -> None:
        self.config, self.policy, self.run_dir = config, policy, run_dir
        self.rich = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self.watch = Watch(masks=not isinstance(config.objective, PolicyGradient | DRPO))
        self.warnings: list[str] = []
        self.last: dict[str, Any] = {}
        self.accuracy: list[tuple[int, float]] = []
        self.progress = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self.bar = self.progress.add_task("train", total=config.steps)
        self.live = Live(self._panel(), console=self.rich, refresh_per_second=4) if self.rich.is_terminal else None

    def __enter__(self) -> "Console":
        trained = sum(p.numel() for p in self.policy.parameters)
        total = sum(p.numel() for p in self.policy.model.parameters())
        place = f"on {self.policy.device}, {str(self.policy.dtype).removeprefix('torch.')}"
        self.say(f"{self.policy.path}: {total:,} parameters, {trained:,} trained, {place}")
        self.say(f"run folder: {self.run_dir}")
        for warning in self.config.warnings:
            self.warn(warning)
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def say(self, text: str) -> None:
        self.rich.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self.rich.print(f"warning: {text}", style="yellow", markup=False)

    def evaluated(self, step: int, result: "Evaluation") -> "Evaluation":
        self.accuracy.append((step, result.accuracy))
        error = result.standard_error()
        self.say(f"step {step}: {result.accuracy:.1%} ± {error:.1%} of {len(result.rewards)} held-out samples right")
        return result

    def stepped(self, metrics: dict[str, Any]) -> None:
        self.last = metrics
        for warning in self.watch.step(metrics):
            self.warn(f"step {metrics['step']}: {warning}")
        self.progress.update(self.bar, completed=metrics["step"])
        if self.live:
            self.live.update(self._panel())
        elif metrics["step"] % max(1, self.config.steps // PLAIN_LINES) == 0 or metrics["step"] in (
            1,
            self.config.steps,
        ):
            self.say(self._line(metrics))

    def interrupted(self, done: int) -> None:
        self._stop()
        saved = f"saving the adapter as it is after step {done}" if done else "no step was finished, nothing is saved"
        self.say(f"interrupted: {saved}")

    def finished(self, summary: dict[str, Any], masked: Sequence[dict[str, Any]]) -> None:
        self._stop()
        if masked:
            table = Table(
                "token", "A", "masked", "of", "mean mu", "mean pi", title="tokens the trust region masked most"
            )
            for row in masked[:10]:
                text, share = repr(row["text"]), f"{row['mean_mu']:.3f}"
                table.add_row(
                    text, row["advantage"], str(row["masked"]), str(row["seen"]), share, f"{row['mean_pi']:.3f}"
                )
            self.rich.print(table)
        before, after = summary["eval_before"], summary["eval_after"]
        rows = [
            ("accuracy before", f"{before:.1%}"),
            ("accuracy after", "not measured" if after is None else f"{after:.1%}"),
            ("steps", f"{summary['steps']} of {self.config.steps}"),
            ("seconds", f"{summary['seconds']:.0f}"),
            ("peak memory", f"{summary['peak_memory_gib']:.2f} GiB"),
            ("adapter", summary["adapter"]),
        ]
        print_table("train", rows, self.rich)

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

    def _line(self, metrics: dict[str, Any]) -> str:
        cells = [cell for row in _cells(metrics) for cell in row]
        return f"step {metrics['step']}/{self.config.steps}  " + "  ".join(cells)


def _cells(m: dict[str, Any]) -> list[list[str]]:
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
