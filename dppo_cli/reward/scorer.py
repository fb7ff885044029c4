"""The interface of rewards: one score per completion."""

from collections.abc import Callable, Sequence
from typing import Protocol

from dppo_cli.types import Completion, Prompt, Score


class Scorer(Protocol):
    """Scores the completions of each prompt, in their order. Raises RewardError if it cannot."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]: ...


class RewardSource(Protocol):
    """A reward option. `load()` imports or builds the scorer, and raises RewardError if it cannot.

    `warn` is told of samples that could not be scored.
    """

    def load(self, warn: Callable[[str], None]) -> Scorer: ...
