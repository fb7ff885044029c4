"""A soft penalty for long responses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dppo_cli.config.checks import check_rules
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score


@dataclass(frozen=True)
class Length:
    """DAPO's soft overlong punishment (arXiv:2503.14476, Eq. 13), with L_cache = share * L_max, |y| in tokens:

    0                               |y| <= L_max - L_cache
    (L_max - L_cache - |y|) / L_cache    L_max - L_cache < |y| <= L_max
    -1                              L_max < |y|
    """

    max_length: int
    share: float

    def __post_init__(self) -> None:
        check_rules("reward", self, {"max_length >= 1": self.max_length >= 1, "0 < share <= 1": 0 < self.share <= 1})

    def load(self, warn: Callable[[str], None]) -> Scorer:
        return self._scores

    def _scores(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        return [[Score(self._penalty(len(c.token_ids_T))) for c in group] for group in completions]

    def _penalty(self, length: int) -> float:
        cache = self.share * self.max_length
        return max(-1.0, min(0.0, (self.max_length - cache - length) / cache))
