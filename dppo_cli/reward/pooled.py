"""Scores by a function that runs in a pool of processes, and what becomes of samples that hang or kill one.

A call that fails is repeated for each group, then for each sample, so that only the samples that cause it get no score.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice
from typing import Any

from dppo_cli.calls.pool import Call, CallError, Pool
from dppo_cli.errors import RewardError
from dppo_cli.types import Completion, Prompt, Score

Pair = tuple[Prompt, Completion]

ANSWER, NOTE = "answer", "note"
"""What a function may log of each sample with `log_extra` that is more than a line of the score's note."""


class PooledScorer:
    """See `EarlyScorer`; only where each sample is a call of its own is there anything to begin with.

    `named`: the reward in messages. `keywords`: what the function gets of samples, with the names of all columns.
    `max_failures`: failures in a row that end the run; None: they never do, and each sample is a call of its own.
    """

    def __init__(
        self,
        named: str,
        pool: Pool,
        keywords: Callable[[Sequence[Pair], Sequence[str]], dict[str, Any]],
        *,
        default: float | None,
        max_failures: int | None,
        warn: Callable[[str], None],
    ) -> None:
        self.named, self.pool, self.keywords = named, pool, keywords
        self.default, self.max_failures, self.warn = default, max_failures, warn
        self.failures = 0  # in a row
        self.blamed: list[str] = []  # of this step
        self.begun: dict[int, tuple[Completion, Future[dict[str, Any] | CallError]]] = {}  # by the completion's id

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        groups = [[(prompt, c) for c in group] for prompt, group in zip(prompts, completions, strict=True)]
        every = [pair for group in groups for pair in group]
        if not every:
            return [[] for _ in groups]
        columns = list(dict.fromkeys(name for prompt in prompts for name in prompt.example.columns))
        self.blamed.clear()
        if self.max_failures is None:
            scores = [score for one in self._each([[pair] for pair in every], columns) for score in one]
        else:
            scores = self._at_once(groups, every, columns)
        rest = iter(scores)
        return [list(islice(rest, len(group))) for group in groups]

    def begin(self, prompt: Prompt, completions: Sequence[Completion]) -> None:
        if self.max_failures is None:
            columns = list(prompt.example.columns)
            for c in completions:
                self.begun[id(c)] = c, self.pool.begin(self._call([(prompt, c)], columns))

    def give_up(self) -> None:
        self.begun.clear()
        self.pool.give_up()

    def _at_once(self, groups: Sequence[Sequence[Pair]], every: Sequence[Pair], columns: Sequence[str]) -> list[Score]:
        try:
            scores = self._scores(self.pool.call(self._call(every, columns)), every)
            self.failures = 0
        except CallError as error:
            scores = [score for group in self._each(groups, columns) for score in group]
            if not self.blamed:
                self.warn(
                    f"{self.named} failed on {len(every)} samples at once ({error}), but not on fewer: raise "
                    "reward.timeout, or score fewer samples a step"
                )
        return scores

    def _each(self, units: Sequence[Sequence[Pair]], columns: Sequence[str]) -> list[list[Score]]:
        """The scores of each unit, a group or a sample; a unit whose call fails is cut into samples, or blamed."""
        called = [unit for unit in units if unit]
        found: list[list[Score]] = []
        # Where failures in a row end the run, so many at a time that they end it soon.
        size = len(called) if self.max_failures is None else self.pool.count
        for start in range(0, len(called), size or 1):
            part = called[start : start + size]
            for unit, answer in zip(part, self._answers(part, columns), strict=True):
                if not isinstance(answer, CallError):
                    self.failures = 0
                    found.append(self._scores(answer, unit))
                elif len(unit) > 1 and not self.pool.about["whole_groups"]:
                    found.append([score for one in self._each([[pair] for pair in unit], columns) for score in one])
                else:
                    found.append(self._blamed(unit, str(answer)))
        if self.max_failures is None and self.blamed:
            more = f" (and on {len(self.blamed) - 1} more of {len(called)} samples)" if len(self.blamed) > 1 else ""
            self.warn(f"{self.blamed[0]}{more}; scored as {self._scored_as()}")
        rest = iter(found)
        return [next(rest) if unit else [] for unit in units]

    def _answers(self, units: Sequence[Sequence[Pair]], columns: Sequence[str]) -> list[dict[str, Any] | CallError]:
        """What the call of each unit gave, or how it failed; those that were begun before are only waited for."""
        try:
            begun = [self._begun(unit) or self.pool.begin(self._call(unit, columns)) for unit in units]
            return [call.result() for call in begun]
        except BaseException:  # Ctrl-C, for one.
            self.give_up()
            raise

    def _begun(self, unit: Sequence[Pair]) -> "Future[dict[str, Any] | CallError] | None":
        _, call = self.begun.pop(id(unit[0][1]), (None, None))
        return call

    def _blamed(self, unit: Sequence[Pair], how: str) -> list[Score]:
        self.failures += 1
        prompt, completion = unit[0]
        what = f"problem {prompt.index}" + (f" ({completion.text[:60]!r})" if len(unit) == 1 else "")
        text = f"{self.named} failed on {what}: {how}"
        self.blamed.append(text)
        if self.max_failures is not None:
            if self.failures >= self.max_failures:
                raise RewardError(f"{text}; that is reward.max_failures={self.max_failures} times in a row")
            self.warn(f"{text}; scored as {self._scored_as()}")
        return [Score(self.default, note=how) for _ in unit]

    def _scored_as(self) -> str:
        return "not judged" if self.default is None else str(self.default)

    def _call(self, pairs: Sequence[Pair], columns: Sequence[str]) -> Call:
        return self.keywords(pairs, columns), max((max(c.versions, default=0) for _, c in pairs), default=0)

    def _scores(self, answer: dict[str, Any], pairs: Sequence[Pair]) -> list[Score]:
        if "raised" in answer:
            raise RewardError(f"{self.named} failed: {answer['raised']}")
        if "returned" in answer:
            raise RewardError(f"{self.named} returned {answer['returned']}; expected a list of {len(pairs)} numbers")
        extra, metrics = answer["extra"], answer["metrics"]
        return [
            self._score(reward, pair, {name: texts[i] for name, texts in extra.items()}, metrics)
            for i, (reward, pair) in enumerate(zip(answer["rewards"], pairs, strict=True))
        ]

    def _score(self, reward: Any, pair: Pair, logged: dict[str, str | None], metrics: dict[str, float]) -> Score:
        prompt, completion = pair
        if isinstance(reward, dict):
            raise RewardError(
                f"{self.named} returned {reward['wrong']} for problem {prompt.index} ({completion.text[:60]!r}); "
                "expected a finite number, or None to leave the sample out"
            )
        answer, note = logged.pop(ANSWER, None), logged.pop(NOTE, None)
        notes = [*([note] if note else []), *(f"{name}: {text}" for name, text in logged.items() if text is not None)]
        if reward is None and not note:
            notes = ["the reward function returned None", *notes]
        value = None if reward is None else float(reward)
        return Score(value, parts=metrics, note="; ".join(notes), answer=answer)


def check_of_pool(of: Any) -> dict[str, bool]:
    """The rules of the options that every reward with a pool has, for `check_rules`."""
    rules = {
        "0 < timeout <= 86400": 0 < of.timeout <= 86400,
        "default is a finite number or null": of.default is None or math.isfinite(of.default),
        "workers >= 1": of.workers >= 1,
        "memory_gib > 0 and finite": 0 < of.memory_gib < math.inf,
    }
    return rules
