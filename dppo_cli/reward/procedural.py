"""Reward by the verifier of a reasoning-gym task."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dppo_cli.calls.pool import Pool
from dppo_cli.config.checks import check_rules
from dppo_cli.reward.patterns import compiled
from dppo_cli.reward.pooled import Pair, PooledScorer, check_of_pool
from dppo_cli.reward.scorer import Scorer

OVERHEAD = 10.0
"""Seconds for the sandbox, and for making a task's verifier."""


@dataclass(frozen=True)
class ReasoningGym:
    """See conf/reward/reasoning_gym.yaml for the fields."""

    task_column: str
    entry_column: str
    pattern: str | None
    sandbox: bool
    timeout: float
    default: float | None
    workers: int
    memory_gib: float

    def __post_init__(self) -> None:
        if self.pattern is not None:
            compiled("reward.pattern", self.pattern)
        check_rules("reward", self, check_of_pool(self))

    def load(self, warn: Callable[[str], None]) -> Scorer:
        module = "verify_task_locked_up" if self.sandbox else "verify_task"
        path = f"dppo_cli.reward.functions.{module}:score"
        seconds = self.timeout + (OVERHEAD if self.sandbox else 0.0)
        pool = Pool(path, self.workers, seconds, self.memory_gib, stateless=True)
        named = "the reward reasoning_gym"
        return PooledScorer(named, pool, self._keywords, default=self.default, max_failures=None, warn=warn)

    def _keywords(self, pairs: Sequence[Pair], columns: Sequence[str]) -> dict[str, Any]:
        rows = [prompt.example.columns for prompt, _ in pairs]
        return {
            "completions": [c.text for _, c in pairs],
            "task": [row.get(self.task_column) for row in rows],
            "entry": [row.get(self.entry_column) for row in rows],
            "pattern": self.pattern,
            "seconds": self.timeout,
            "memory": int(self.memory_gib * 2**30),
        }
