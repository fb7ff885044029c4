"""What a reward function gives in a worker, as JSON. Imports no torch."""

from types import SimpleNamespace
from typing import Any

from dppo_cli.calls.caller import Caller, told

LOGGED = 1000
"""Most characters of a text that a function logs of a sample."""


class Scores:
    """Answers with one number for each completion. `function`: what `find_function` has found."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.caller = Caller()
        self.about = {"whole_groups": bool(getattr(function, "whole_groups", False))}

    def __call__(self, keywords: dict[str, Any], number: int) -> dict[str, Any]:
        """What a call gave: `rewards`, or what was `returned` instead, or `raised`.

        `number`: of rollouts trained on before.

        With `rewards` come the values that were logged of each sample (`extra`) and of the call (`metrics`). Raises
        MemoryError.
        """
        logged = _Logged(keywords)
        ours = {
            "trainer_state": SimpleNamespace(global_step=number),
            "log_extra": logged.log_extra,
            "log_metric": logged.log_metric,
        }
        try:
            rewards = self.caller(self.function, {**keywords, **ours})
            found = rewards if isinstance(rewards, list) else _listed(rewards)
        except MemoryError:
            raise
        except Exception as error:
            return {"raised": told(error)}
        if found is None or len(found) != logged.count:
            return {"returned": type(rewards).__name__ if found is None else f"a list of {len(found)}"}
        metrics = {name: sum(values) / len(values) for name, values in logged.metrics.items()}
        return {"rewards": [_number(reward) for reward in found], "extra": logged.extra, "metrics": metrics}


class _Logged:
    """What a function logs through the callables that TRL passes, too."""

    def __init__(self, keywords: dict[str, Any]) -> None:
        self.count, self.keywords = len(keywords["completions"]), keywords
        self.extra: dict[str, list[str | None]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Any) -> None:
        """A text for each sample."""
        texts = [None if value is None else str(value)[:LOGGED] for value in values]
        if len(texts) != self.count:
            raise ValueError(f"log_extra({column!r}) got {len(texts)} values for {self.count} samples")
        # A column of the data, logged as it is, says nothing of the sample. (`answer` is the response's.)
        if column == "answer" or list(values) != self.keywords.get(column):
            self.extra[str(column)] = texts

    def log_metric(self, name: str, value: Any) -> None:
        """A number for the call."""
        number = _number(value)
        if not isinstance(number, float):
            raise ValueError(f"log_metric({name!r}) got {value!r}, which is not a finite number")
        self.metrics.setdefault(str(name), []).append(number)


def _listed(rewards: Any) -> list[Any] | None:
    """A tuple, an array, a tensor or a generator as a list; None for what is no list of numbers."""
    if isinstance(rewards, str | bytes | dict | set):
        return None
    try:
        items = iter(rewards)
    except TypeError:
        return None
    return list(items)


def _number(reward: Any) -> float | dict[str, str] | None:
    """A number, None, or the text of something else."""
    if reward is None:
        return None
    try:
        number = float(reward)
        if number - number == 0:  # neither NaN nor infinite
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    return {"wrong": repr(reward)[:200]}
