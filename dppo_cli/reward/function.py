"""Reward from the user's own Python function: f(prompts, completions, **columns) -> list[float | None].

The function runs in processes of its own (`pool.py`). A call that hangs or kills its process is repeated for each
group, then for each sample, so that only the samples that cause it get no score.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dppo_cli.config.build import CodePath
from dppo_cli.config.checks import check_rules
from dppo_cli.errors import RewardError
from dppo_cli.reward.pool import Call, CallError, Pool
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score

Pair = tuple[Prompt, Completion]


@dataclass(frozen=True)
class Function:
    """See conf/reward/function.yaml for the fields."""

    path: CodePath
    timeout: float
    default: float | None
    max_failures: int
    workers: int
    memory_gib: float

    def __post_init__(self) -> None:
        rules = {
            "timeout > 0 and finite": 0 < self.timeout < math.inf,
            "default is a finite number or null": self.default is None or math.isfinite(self.default),
            "max_failures >= 1": self.max_failures >= 1,
            "workers >= 1": self.workers >= 1,
            "memory_gib > 0 and finite": 0 < self.memory_gib < math.inf,
        }
        check_rules("reward", self, rules)

    def load(self, warn: Callable[[str], None]) -> Scorer:
        where, _, name = self.path.rpartition(":")
        if not where or not name:
            raise RewardError(f"reward.path={self.path} names no function; write file.py:function or module:function")
        pool = Pool(self.path, self.workers, self.timeout, self.memory_gib)
        return FunctionScorer(self, pool, warn)


class FunctionScorer:
    """See `Scorer`."""

    def __init__(self, option: Function, pool: Pool, warn: Callable[[str], None]) -> None:
        self.option, self.pool, self.warn = option, pool, warn
        self.failures = 0  # in a row
        self.blamed = 0  # in all

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        groups = [[(prompt, c) for c in group] for prompt, group in zip(prompts, completions, strict=True)]
        every = [pair for group in groups for pair in group]
        if not every:
            return [[] for _ in groups]
        columns = list(dict.fromkeys(name for prompt in prompts for name in prompt.example.columns))
        try:
            scores = self._scores(self.pool.call(_call(every, columns)), every)
            self.failures = 0
        except CallError as error:
            failures = self.blamed
            scores = [score for group in self._each(groups, columns) for score in group]
            if self.blamed == failures:
                self.warn(
                    f"the reward function {self.option.path} failed on {len(every)} samples at once ({error}), but not "
                    "on fewer: raise reward.timeout, or score fewer samples a step"
                )
        rest = iter(scores)
        return [list(islice(rest, len(group))) for group in groups]

    def _each(self, units: Sequence[Sequence[Pair]], columns: Sequence[str]) -> list[list[Score]]:
        """The scores of each unit, a group or a sample; a unit whose call fails is cut into samples, or blamed."""
        called = [unit for unit in units if unit]
        found: list[list[Score]] = []
        # So many at a time that too many failures in a row end it soon.
        for start in range(0, len(called), self.pool.count):
            part = called[start : start + self.pool.count]
            for unit, answer in zip(part, self.pool.call_each([_call(u, columns) for u in part]), strict=True):
                if not isinstance(answer, CallError):
                    self.failures = 0
                    found.append(self._scores(answer, unit))
                elif len(unit) > 1 and not self.pool.whole_groups:
                    found.append([score for one in self._each([[pair] for pair in unit], columns) for score in one])
                else:
                    found.append(self._blamed(unit, str(answer)))
        rest = iter(found)
        return [next(rest) if unit else [] for unit in units]

    def _blamed(self, unit: Sequence[Pair], how: str) -> list[Score]:
        self.failures += 1
        self.blamed += 1
        (prompt, completion), option = unit[0], self.option
        what = f"problem {prompt.index}" + (f" ({completion.text[:60]!r})" if len(unit) == 1 else "")
        text = f"the reward function {option.path} failed on {what}: {how}"
        if self.failures >= option.max_failures:
            raise RewardError(f"{text}; that is reward.max_failures={option.max_failures} times in a row")
        self.warn(f"{text}; scored as {'not judged' if option.default is None else option.default}")
        return [Score(option.default, note=how) for _ in unit]

    def _scores(self, answer: dict[str, Any], pairs: Sequence[Pair]) -> list[Score]:
        path = self.option.path
        if "raised" in answer:
            raise RewardError(f"the reward function {path} failed: {answer['raised']}")
        if "returned" in answer:
            raise RewardError(
                f"the reward function {path} returned {answer['returned']}; expected a list of {len(pairs)} numbers"
            )
        return [_score(reward, path, *pair) for reward, pair in zip(answer["rewards"], pairs, strict=True)]


def _call(pairs: Sequence[Pair], names: Sequence[str]) -> Call:
    columns: dict[str, list[Any]] = {"answer": [prompt.example.answer for prompt, _ in pairs]}
    columns |= {name: [prompt.example.columns.get(name) for prompt, _ in pairs] for name in names}
    return [prompt.example.prompt for prompt, _ in pairs], [c.text for _, c in pairs], columns


def _score(reward: Any, path: str, prompt: Prompt, completion: Completion) -> Score:
    if reward is None:
        return Score(None, note="the reward function returned None")
    if isinstance(reward, dict):
        raise RewardError(
            f"the reward function {path} returned {reward['wrong']} for problem {prompt.index} "
            f"({completion.text[:60]!r}); expected a finite number, or None to leave the sample out"
        )
    return Score(float(reward))
