"""Reward 1 for the right answer, else 0."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dppo_cli.errors import ConfigError
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score


@dataclass(frozen=True)
class Exact:
    """1.0 if the response (or the last match of `pattern` in it), stripped of white space, equals the answer."""

    pattern: str | None

    def __post_init__(self) -> None:
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ConfigError(f"reward.pattern={self.pattern!r} is not a regular expression: {error}") from None

    def load(self, warn: Callable[[str], None]) -> Scorer:
        return self._score

    def _score(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        return [
            [Score(float(self._extract(c.text) == prompt.example.answer.strip())) for c in group]
            for prompt, group in zip(prompts, completions, strict=True)
        ]

    def _extract(self, text: str) -> str | None:
        if self.pattern is None:
            return text.strip()
        matches = list(re.finditer(self.pattern, text))
        found = matches[-1].group(1 if matches[-1].re.groups else 0) if matches else None
        return found if found is None else found.strip()
