"""Reward 1 for an answer that is mathematically equal to the right one, by math-verify, else 0."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dppo_cli.calls.pool import Pool
from dppo_cli.config.checks import check_rules
from dppo_cli.reward.pooled import Pair, PooledScorer, check_of_pool
from dppo_cli.reward.scorer import Scorer


@dataclass(frozen=True)
class Math:
    """See conf/reward/math.yaml for the fields."""

    boxed_only: bool
    timeout: float
    default: float | None
    workers: int
    memory_gib: float

    def __post_init__(self) -> None:
        check_rules("reward", self, check_of_pool(self))

    def load(self, warn: Callable[[str], None]) -> Scorer:
        path = "dppo_cli.reward.functions.verify_math:score"
        pool = Pool(path, self.workers, self.timeout, self.memory_gib, stateless=True)
        return PooledScorer("the reward math", pool, self._keywords, default=self.default, max_failures=None, warn=warn)

    def _keywords(self, pairs: Sequence[Pair], columns: Sequence[str]) -> dict[str, Any]:
        return {
            "completions": [c.text for _, c in pairs],
            "answer": [prompt.example.answer for prompt, _ in pairs],
            "boxed_only": self.boxed_only,
        }
