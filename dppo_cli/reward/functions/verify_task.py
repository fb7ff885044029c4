"""The verifiers of reasoning-gym. Some of them evaluate the answer as Python, so they run in the sandbox."""

import json
import logging
import os
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from dppo_cli.errors import RewardError
from dppo_cli.reward.functions import sandbox
from dppo_cli.reward.patterns import TooSlowError, compiled, last_match

# reasoning-gym imports it, and it tells of its cache folder.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It leaves a file open.
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
except ImportError:
    raise RewardError("reward=reasoning_gym needs the package reasoning-gym: pip install 'dppo[tasks]'") from None

KEY = "reward.pattern"
PACKAGES = str(Path(reasoning_gym.__file__).parent.parent)
DISK, OUTPUT, PROCESSES = 2**20, 2**16, 8


def score(
    completions: Sequence[str],
    task: Sequence[str | None],
    entry: Sequence[str | None],
    log_extra: Callable[[str, Sequence[Any]], None],
    pattern: str | None,
    seconds: float,
    memory: int,
    locked_up: bool = False,
) -> list[float | None]:
    """The score of each answer by its task's verifier, from 0 to 1; None for a row of another data set."""
    limits = sandbox.Limits(seconds, memory, PROCESSES, DISK, OUTPUT) if locked_up else None
    found = [_score(*row, pattern, limits) for row in zip(completions, task, entry, strict=True)]
    log_extra("answer", [answer for _, answer, _ in found])
    log_extra("note", [note for _, _, note in found])
    return [value for value, _, _ in found]


def _score(
    text: str, task: str | None, entry: str | None, pattern: str | None, limits: sandbox.Limits | None
) -> tuple[float | None, str | None, str]:
    if task is None or entry is None:
        return None, None, "the row is not of data=reasoning_gym"
    if task not in DATASETS:
        return None, None, f"reasoning-gym has no task {task!r}"
    try:
        answer = text.strip() if pattern is None else last_match(KEY, compiled(KEY, pattern), text)
    except TooSlowError as error:
        return None, None, str(error)
    if answer is None:
        return 0.0, None, "no answer was found"
    verifier, row = _verifier(task), json.loads(entry)
    if limits is None:
        value, note = _verified(verifier, answer, row)
        return value, answer, note

    def job() -> None:
        os.write(1, json.dumps(_verified(verifier, answer, row)).encode())

    outcome = sandbox.run(job, limits, seen=[PACKAGES])
    try:
        value, note = json.loads(outcome.output)
    except ValueError:
        value, note = 0.0, outcome.stopped or "its verifier was ended by the answer"
    if outcome.stopped == sandbox.SHORT_OF_MEMORY:
        return None, None, outcome.stopped
    return float(value), answer, str(note)


def _verified(verifier: Callable[..., Any], answer: str, row: dict[str, Any]) -> tuple[float, str]:
    try:
        return min(1.0, max(0.0, float(verifier(answer=answer, entry=row)))), ""
    except Exception as error:  # Verifiers are not made for every text.
        return 0.0, f"its verifier cannot read the answer ({type(error).__name__})"


@lru_cache(256)
def _verifier(task: str) -> Callable[..., Any]:
    made: Any = reasoning_gym.create_dataset(task, seed=0, size=1)
    return made.score_answer  # type: ignore[no-any-return]
