"""Reward from the user's own Python function: f(prompts, completions, **columns) -> list[float | None]."""

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dppo_cli.config.build import FilePath
from dppo_cli.config.checks import did_you_mean
from dppo_cli.errors import RewardError
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score

RewardFunction = Callable[..., list[float | None]]


@dataclass(frozen=True)
class Function:
    """`path`: file.py:function or package.module:function."""

    path: FilePath

    def load(self) -> Scorer:
        where, _, name = self.path.rpartition(":")
        if not where or not name:
            raise RewardError(f"reward.path={self.path} names no function; write file.py:function or module:function")
        function = self._find(_import(where), name)

        def score(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
            return _call(function, self.path, prompts, completions)

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
        # A prefixed name, so that a file called random.py does not replace the module `random`.
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


def _call(
    function: RewardFunction, path: str, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
) -> list[list[Score]]:
    """One call for all prompts."""
    pairs = [(p, c) for p, group in zip(prompts, completions, strict=True) for c in group]
    columns: dict[str, list[Any]] = {"answer": [p.example.answer for p, _ in pairs]}
    for name in dict.fromkeys(name for p in prompts for name in p.example.columns):
        columns[name] = [p.example.columns.get(name) for p, _ in pairs]
    try:
        rewards = function([p.example.prompt for p, _ in pairs], [c.text for _, c in pairs], **columns)
    except Exception as error:
        raise RewardError(f"the reward function {path} failed: {type(error).__name__}: {error}") from error
    if not isinstance(rewards, list) or len(rewards) != len(pairs):
        got = f"a list of {len(rewards)}" if isinstance(rewards, list) else type(rewards).__name__
        raise RewardError(f"the reward function {path} returned {got}; expected a list of {len(pairs)} numbers")
    scores = iter([_score(reward, path, p, c) for reward, (p, c) in zip(rewards, pairs, strict=True)])
    return [list(islice(scores, len(group))) for group in completions]


def _score(reward: Any, path: str, prompt: Prompt, completion: Completion) -> Score:
    if reward is None:
        return Score(None, note="the reward function returned None")
    try:
        number = float(reward)
    except (TypeError, ValueError, OverflowError):
        number = math.inf
    if not math.isfinite(number):
        raise RewardError(
            f"the reward function {path} returned {reward!r} for problem {prompt.index} "
            f"({completion.text[:60]!r}); expected a finite number, or None to leave the sample out"
        )
    return Score(number)
