"""Reward 1 for the right answer, else 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dppo_cli.reward.patterns import TooSlowError, compiled, last_match
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score

KEY = "reward.pattern"


@dataclass(frozen=True)
class Exact:
    """1.0 if the response (or the last match of `pattern` in it), stripped of white space, equals the answer."""

    pattern: str | None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            compiled(KEY, self.pattern)

    def load(self, warn: Callable[[str], None]) -> Scorer:
        return self._scores

    def _scores(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        return [
            [self._score(c.text, prompt.example.answer.strip()) for c in group]
            for prompt, group in zip(prompts, completions, strict=True)
        ]

    def _score(self, text: str, answer: str) -> Score:
        try:
            found = text.strip() if self.pattern is None else last_match(KEY, compiled(KEY, self.pattern), text)
        except TooSlowError as error:
            return Score(None, note=str(error))
        return Score(float(found == answer), answer=found)
