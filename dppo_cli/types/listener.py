"""What a run tells those who listen to it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dppo_cli.types.batch import TokenStats
from dppo_cli.types.group import Group


@dataclass(frozen=True)
class RunInfo:
    """A run as it starts."""

    run_dir: Path
    step: int  # after which it goes on; 0 for a new one
    steps: int  # of the whole run
    model: str
    parameters: int
    trained_parameters: int
    device: str
    dtype: str
    samples_with: str  # the rollout engine's weights, in words


@dataclass(frozen=True)
class EvalReport:
    """An evaluation after `step` steps on the set `name`. Accuracy, its standard error and 95% interval in [0, 1].

    None if not measured.
    """

    step: int
    name: str
    accuracy: float | None
    standard_error: float | None
    interval: tuple[float, float] | None
    groups: Sequence[Group]


@dataclass(frozen=True)
class StepReport:
    """A finished step: the line of metrics.jsonl, its groups, and the token statistics of each update."""

    metrics: Mapping[str, Any]
    groups: Sequence[Group]
    updates: Sequence[Sequence[TokenStats]]


class Listener(Protocol):
    """Hears a run: a console, a tracker, a report. An exception in one is told once and never reaches the run."""

    def started(self, run: RunInfo) -> None: ...
    def evaluated(self, report: EvalReport) -> None: ...
    def stepped(self, report: StepReport) -> None: ...
    def warned(self, text: str) -> None: ...

    def finished(self, summary: Mapping[str, Any] | None) -> None:
        """Comes last, and always. None: the run ended by an error, or before its first step."""
        ...
