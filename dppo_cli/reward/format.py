"""Reward 1 for a response of the right form, else 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dppo_cli.reward.patterns import TooSlowError, compiled, matches
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score

KEY = "reward.pattern"


@dataclass(frozen=True)
class Format:
    """1.0 if the whole response matches `pattern`."""

    pattern: str

    def __post_init__(self) -> None:
        compiled(KEY, self.pattern)

    def load(self, warn: Callable[[str], None]) -> Scorer:
        return self._scores

    def _scores(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        return [[self._score(c.text) for c in group] for group in completions]

    def _score(self, text: str) -> Score:
        try:
            return Score(float(matches(KEY, compiled(KEY, self.pattern), text)))
        except TooSlowError as error:
            return Score(None, note=str(error))
