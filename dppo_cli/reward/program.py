"""Reward for a program that passes the tests of its problem. It runs locked up; docs/rewards.md says how well."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dppo_cli.calls.pool import Pool
from dppo_cli.config.checks import check_rules
from dppo_cli.reward.patterns import compiled
from dppo_cli.reward.pooled import Pair, PooledScorer
from dppo_cli.reward.scorer import Scorer

OVERHEAD = 2.0
"""Seconds that a test may take beyond those of its program."""


@dataclass(frozen=True)
class Code:
    """See conf/reward/code.yaml for the fields."""

    tests_column: str
    pattern: str | None
    partial: bool
    max_tests: int
    timeout: float
    memory_mib: int
    processes: int
    disk_mib: int
    output_kib: int
    workers: int

    def __post_init__(self) -> None:
        if self.pattern is not None:
            compiled("reward.pattern", self.pattern)
        rules = {
            "max_tests >= 1": self.max_tests >= 1,
            "0 < timeout <= 3600": 0 < self.timeout <= 3600,
            "memory_mib >= 64": self.memory_mib >= 64,
            "processes >= 1": self.processes >= 1,
            "disk_mib >= 1": self.disk_mib >= 1,
            "output_kib >= 1": self.output_kib >= 1,
            "workers >= 1": self.workers >= 1,
        }
        check_rules("reward", self, rules)

    def load(self, warn: Callable[[str], None]) -> Scorer:
        path = "dppo_cli.reward.functions.run_program:score"
        longest = self.max_tests * (self.timeout + OVERHEAD)
        pool = Pool(path, self.workers, longest, 1 + self.memory_mib / 1024, stateless=True)
        return PooledScorer("the reward code", pool, self._keywords, default=None, max_failures=None, warn=warn)

    def _keywords(self, pairs: Sequence[Pair], columns: Sequence[str]) -> dict[str, Any]:
        return {
            "completions": [c.text for _, c in pairs],
            "tests": [prompt.example.columns.get(self.tests_column) for prompt, _ in pairs],
            "entry_point": [prompt.example.columns.get("entry_point") for prompt, _ in pairs],
            "pattern": self.pattern,
            "partial": self.partial,
            "max_tests": self.max_tests,
            "limits": (
                self.timeout,
                self.memory_mib * 2**20,
                self.processes,
                self.disk_mib * 2**20,
                self.output_kib * 2**10,
            ),
        }
