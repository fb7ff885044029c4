"""How far a run is: the time that is left, its curves, the memory of its GPU."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from statistics import mean
from typing import Any

import torch

from dppo_cli.training.evaluation import HELD_OUT
from dppo_cli.training.run_folder import METRICS
from dppo_cli.types import EvalReport, RunInfo

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 40
"""Characters of a curve."""
RECENT = 20
"""Steps that say how long a step takes."""
LONGEST = timedelta(days=1000)
"""Beyond it, as for a run that goes on until it is stopped, the time left is not told in seconds."""


class TimeLeft:
    """Seconds to the end of a run, its evaluations counted in. `every`: steps between evaluations; 0: none between."""

    def __init__(self, every: int) -> None:
        self.every, self.steps, self.step = every, 0, 0
        self.recent: list[float] = []  # seconds of steps, without evaluations
        self.between: float | None = None  # seconds of an evaluation between steps, on the run's own problems
        self.at_end: float | None = None  # and of one on all sets
        self.began = 0.0

    def started(self, run: RunInfo) -> None:
        self.steps, self.step, self.recent, self.began = run.steps, run.step, [], time.monotonic()

    def evaluated(self, report: EvalReport) -> None:
        if not self.recent and report.step == self.step:  # before the first step
            self.at_end = time.monotonic() - self.began
            self.between = self.at_end if report.name == HELD_OUT else self.between

    def stepped(self, metrics: Mapping[str, Any]) -> None:
        seconds = metrics["time"]
        self.step = metrics["step"]
        self.between = seconds.get("eval", self.between)
        self.recent = [*self.recent, seconds["total"] - seconds.get("eval", 0.0)][-RECENT:]

    @property
    def seconds(self) -> float | None:
        """None before the first step."""
        if not self.recent:
            return None
        between = (self.steps - 1) // self.every - self.step // self.every if self.every else 0
        evaluations = max(0, between) * (self.between or 0.0) + (self.at_end or self.between or 0.0)
        return (self.steps - self.step) * mean(self.recent) + evaluations

    def __str__(self) -> str:
        if self.seconds is None:
            return "-:--:--"
        left = timedelta(seconds=min(self.seconds, LONGEST.total_seconds() + 1))
        return f"> {LONGEST.days} days" if left > LONGEST else str(timedelta(seconds=round(left.total_seconds())))


def curve(values: Sequence[float]) -> str:
    """A run of values in one line. Example: `▁▃▅█ 0.100 -> 0.450`."""
    n = min(WIDTH, len(values))
    means = [mean(values[i * len(values) // n : (i + 1) * len(values) // n]) for i in range(n)]
    low, span = min(means), max(means) - min(means)
    bars = "".join(BARS[round((value - low) / span * (len(BARS) - 1)) if span else 0] for value in means)
    return f"{bars} {values[0]:.3f} -> {values[-1]:.3f}"


def earlier_rewards(run: RunInfo) -> list[float]:
    """Those of a run that goes on."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        lines = (run.run_dir / METRICS).read_text(encoding="utf-8").splitlines()
        return [reward for line in lines if (reward := json.loads(line)["reward"]) is not None]
    return []


def gpu_memory() -> str:
    """Of the whole card, other programs included."""
    free, total = torch.cuda.mem_get_info()
    return f"GPU memory {(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB"
