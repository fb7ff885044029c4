"""Reward from a Python function of the user's: f(prompts, completions, **columns) -> list[float | None]."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dppo_cli.errors import RewardError
from dppo_cli.reward.scorer import Scorer
from dppo_cli.sections import did_you_mean
from dppo_cli.types import Completion

RewardFunction = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Function:
    """`path`: file.py:function or package.module:function."""

    path: str

    def load(self) -> Scorer:
        where, _, name = self.path.rpartition(":")
        if not where or not name:
            raise RewardError(f"reward.path={self.path} names no function; write file.py:function or module:function")
        function = self._find(_import(where), name)

        def score(completions: Sequence[Completion]) -> list[float]:
            return _call(function, self.path, completions)

        return score

    def _find(self, module: Any, name: str) -> RewardFunction:
        function = getattr(module, name, None)
        if not callable(function):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise RewardError(f"reward.path={self.path}: there is no function {name!r}{did_you_mean(name, names)}")
        return function  # type: ignore[no-any-return]


def _import(where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where)
        if not path.is_file():
            raise RewardError(f"reward.path: there is no file {where} (in {Path.cwd()})")
        # A name of its own: a file called random.py must not become everybody's `random`.
        spec = importlib.util.spec_from_file_location(f"dppo_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        return module
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward.path={where} cannot be imported: {type(error).__name__}: {error}") from error


def _call(function: RewardFunction, path: str, completions: Sequence[Completion]) -> list[float]:
    columns: dict[str, list[Any]] = {"answer": [c.prompt.answer for c in completions]}
    for name in dict.fromkeys(name for c in completions for name in c.prompt.columns):
        columns[name] = [c.prompt.columns.get(name) for c in completions]
    try:
        rewards = function([c.prompt.text for c in completions], [c.text for c in completions], **columns)
    except Exception as error:
        raise RewardError(f"the reward function {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(rewards, list) or len(rewards) != len(completions):
        got = f"a list of {len(rewards)}" if isinstance(rewards, list) else type(rewards).__name__
        raise RewardError(f"the reward function {path} returned {got}; expected a list of {len(completions)} numbers")
    return [_number(reward, path, c) for reward, c in zip(rewards, completions, strict=True)]


def _number(reward: Any, path: str, completion: Completion) -> float:
    if reward is None:
        return math.nan
    try:
        number = float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(
            f"the reward function {path} returned {reward!r} for problem {completion.prompt.index} "
            f"({completion.text[:60]!r}); expected a finite number, or None to leave the sample out"
        )
    return number
