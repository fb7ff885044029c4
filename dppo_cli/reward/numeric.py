"""Reward 1 for the right number, however it is written, else 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from dppo_cli.config.checks import check_rules
from dppo_cli.reward.numbers_in_text import equal, last_number, value_of, written
from dppo_cli.reward.patterns import TooSlowError, compiled, last_match
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score

KEY = "reward.pattern"


@dataclass(frozen=True)
class Numeric:
    """See conf/reward/numeric.yaml for the fields."""

    pattern: str | None
    relative_tolerance: float
    absolute_tolerance: float

    def __post_init__(self) -> None:
        if self.pattern is not None:
            compiled(KEY, self.pattern)
        rules = {
            "0 <= relative_tolerance < 1": 0 <= self.relative_tolerance < 1,
            "absolute_tolerance >= 0": self.absolute_tolerance >= 0,
        }
        check_rules("reward", self, rules)

    def load(self, warn: Callable[[str], None]) -> Scorer:
        return NumericScorer(str, self._found, self.relative_tolerance, self.absolute_tolerance, warn)

    def _found(self, text: str) -> str | None:
        if self.pattern is not None:
            text = last_match(KEY, compiled(KEY, self.pattern), text) or ""
        return last_number(text)


class NumericScorer:
    """See `Scorer`. `right` and `found` take the number out of a problem's answer and out of a response."""

    def __init__(
        self,
        right: Callable[[str], str],
        found: Callable[[str], str | None],
        relative: float,
        absolute: float,
        warn: Callable[[str], None],
    ) -> None:
        self.right, self.found, self.relative, self.absolute, self.warn = right, found, relative, absolute, warn
        self.warned = False

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        return [self._group(prompt, group) for prompt, group in zip(prompts, completions, strict=True)]

    def _group(self, prompt: Prompt, group: Sequence[Completion]) -> list[Score]:
        right = value_of(self.right(prompt.example.answer))
        if right is not None:
            return [self._score(c.text, right) for c in group]
        note = f"the answer {prompt.example.answer[-60:]!r} of problem {prompt.index} is not a number"
        if not self.warned:
            self.warned = True
            self.warn(f"{note}; it is not judged, nor are others like it")
        return [Score(None, note=note) for _ in group]

    def _score(self, text: str, right: Decimal) -> Score:
        try:
            found = self.found(text)
        except TooSlowError as error:
            return Score(None, note=str(error))
        value = None if found is None else value_of(found)
        if value is None:
            return Score(0.0, note="no number was found")
        return Score(float(equal(value, right, self.relative, self.absolute)), answer=written(value))
