"""Reward from the user's own Python functions, called as TRL calls them: f(completions=..., **columns).

A function runs in processes of its own (`pool.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dppo_cli.calls.pool import Pool
from dppo_cli.config.build import CodePaths
from dppo_cli.config.checks import check_rules
from dppo_cli.errors import ConfigError, RewardError
from dppo_cli.reward.mixture import MixtureScorer
from dppo_cli.reward.pooled import Pair, PooledScorer, check_of_pool
from dppo_cli.reward.scorer import Scorer


@dataclass(frozen=True)
class Function:
    """See conf/reward/function.yaml for the fields."""

    path: CodePaths
    weights: list[float] | None
    timeout: float
    default: float | None
    max_failures: int
    workers: int
    memory_gib: float

    def __post_init__(self) -> None:
        rules = {
            "path is file.py:function, or a list of them": all(isinstance(path, str) for path in self._paths),
            "path names a function": bool(self._paths),
            "max_failures >= 1": self.max_failures >= 1,
            "weights are finite": all(math.isfinite(weight) for weight in self.weights or []),
            **check_of_pool(self),
        }
        check_rules("reward", self, rules)
        if self.weights is not None and len(self.weights) != len(self._paths):
            raise ConfigError(
                f"reward.weights has {len(self.weights)} numbers, and reward.path names {len(self._paths)} functions; "
                "give one for each"
            )

    @property
    def _paths(self) -> list[str]:
        return list(self.path) if isinstance(self.path, list | tuple) else [self.path]

    def load(self, warn: Callable[[str], None]) -> Scorer:
        scorers = [self._loaded(path, warn) for path in self._paths]
        if not isinstance(self.path, list | tuple) and self.weights is None:
            return scorers[0]
        names = _names(self._paths)
        return MixtureScorer(dict(zip(names, scorers, strict=True)), dict(zip(names, self.weights or [], strict=False)))

    def _loaded(self, path: str, warn: Callable[[str], None]) -> Scorer:
        where, _, name = path.rpartition(":")
        if not where or not name:
            raise RewardError(f"reward.path={path} names no function; write file.py:function or module:function")
        return PooledScorer(
            f"the reward function {path}",
            Pool(path, self.workers, self.timeout, self.memory_gib),
            keywords,
            default=self.default,
            max_failures=self.max_failures,
            warn=warn,
        )


def keywords(pairs: Sequence[Pair], columns: Sequence[str]) -> dict[str, Any]:
    """What a function is passed: every column under its name, and what TRL passes."""
    found: dict[str, Any] = {name: [prompt.example.columns.get(name) for prompt, _ in pairs] for name in columns}
    # `answer` is always there: the problem's own, unless the data has a column of that name.
    found["answer"] = [prompt.example.columns.get("answer", prompt.example.answer) for prompt, _ in pairs]
    found["prompts"] = [[dict(m) for m in prompt.messages] or prompt.example.prompt for prompt, _ in pairs]
    found["completions"] = [list(map(dict, c.said)) if prompt.messages else c.written for prompt, c in pairs]
    found["completion_ids"] = [c.token_ids_T.tolist() for _, c in pairs]
    return found


def _names(paths: Sequence[str]) -> list[str]:
    """The name of each function; with its file or module where two share one."""
    short = [path.rpartition(":")[2] for path in paths]
    if len(set(short)) == len(short):
        return short
    longer = [f"{Path(path.rpartition(':')[0]).stem}.{name}" for path, name in zip(paths, short, strict=True)]
    return longer if len(set(longer)) == len(longer) else list(paths)
