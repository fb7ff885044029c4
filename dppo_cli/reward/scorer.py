"""The interface of rewards: one score per completion."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from dppo_cli.types import Completion, Prompt, Score


class Scorer(Protocol):
    """Scores the completions of each prompt, in their order. Raises RewardError if it cannot."""

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]: ...


@runtime_checkable
class EarlyScorer(Scorer, Protocol):
    """A scorer that judges elsewhere, and may begin with a group before the call that asks for its scores.

    The call gives the same scores, and warns and fails as it would without; it holds every group that was begun with.
    """

    def begin(self, prompt: Prompt, completions: Sequence[Completion]) -> None:
        """Begin with a group, and return at once. Raises RewardError where another has already failed for good."""
        ...

    def give_up(self) -> None:
        """End what was begun with: the run ends. Nothing is asked of the scorer any more."""
        ...


class RewardSource(Protocol):
    """A reward option. `load()` imports or builds the scorer, and raises RewardError if it cannot.

    `warn` is told of samples that could not be scored.
    """

    def load(self, warn: Callable[[str], None]) -> Scorer: ...
