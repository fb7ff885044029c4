"""What the loop asks of a reward: a number per completion, NaN where it declines to judge."""

from collections.abc import Sequence
from typing import Protocol

from dppo_cli.types import Completion


class Scorer(Protocol):
    """Scores completions. Raises RewardError where it cannot."""

    def __call__(self, completions: Sequence[Completion]) -> list[float]: ...


class RewardSource(Protocol):
    """A reward option; `load()` imports or builds the scorer and raises RewardError where it cannot."""

    def load(self) -> Scorer: ...
