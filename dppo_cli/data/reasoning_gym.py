"""Problems of the library reasoning-gym (https://github.com/open-thought/reasoning-gym, Apache-2.0), made here.

Each problem has the columns `task`, `question`, `answer` and `entry`: the whole problem as JSON, from which the task's
own verifier scores a response.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dppo_cli.config.checks import check_rules, did_you_mean
from dppo_cli.data.examples import content
from dppo_cli.data.task import Task, Warn
from dppo_cli.errors import ConfigError
from dppo_cli.types import Example

ATTEMPTS = 4
"""Problems that are made for each one that is wanted, where a task repeats itself."""


@dataclass(frozen=True)
class ReasoningGym:
    """`eval_problems` problems of `task` to hold out, and `train_problems` others; the same for the same `seed`."""

    task: str
    options: dict[str, Any] | None
    seed: int
    train_problems: int
    eval_problems: int

    def __post_init__(self) -> None:
        rules = {
            "seed >= 0": self.seed >= 0,
            "train_problems >= 1": self.train_problems >= 1,
            "eval_problems >= 1": self.eval_problems >= 1,
        }
        check_rules("data", self, rules)
        if taken := {"seed", "size"} & (self.options or {}).keys():
            raise ConfigError(f"data.options.{min(taken)} is set by dppo itself; use data.seed and data.train_problems")

    def load(self, warn: Warn) -> Task:
        """Make the problems. Raises ConfigError for what the library does not have or take, or if it is missing."""
        made = self._problems()
        # Held out first, so that a longer training set leaves the held-out problems as they are.
        heldout = list(islice(made, self.eval_problems))
        taken = {content(example) for example in heldout}
        train: list[Example] = []
        for example in made:
            if content(example) not in taken:
                train.append(example)
                taken.add(content(example))
            if len(train) == self.train_problems:
                break
        if not train:
            raise ConfigError(
                f"data.task={self.task} has no problems beside the held-out ones; lower data.eval_problems"
            )
        if len(train) < self.train_problems:
            warn(
                f"data.task={self.task} repeats itself: {len(train)} different training problems instead of "
                f"{self.train_problems}"
            )
        return Task(train, heldout)

    def _problems(self) -> Iterator[Example]:
        size = self.eval_problems + ATTEMPTS * self.train_problems
        dataset = _made(self.task, {**(self.options or {}), "seed": self.seed, "size": size})
        for n in range(size):
            entry = dataset[n]
            text = json.dumps(entry, default=str)
            if n == 0 and dataset.score_answer(entry["answer"], json.loads(text)) != dataset.score_answer(
                entry["answer"], entry
            ):
                raise ConfigError(
                    f"data.task={self.task} cannot be scored in another process: its verifier needs Python objects "
                    "that JSON does not hold; choose another task"
                )
            answer = "" if entry["answer"] is None else str(entry["answer"])
            columns = {"task": self.task, "question": entry["question"], "answer": answer, "entry": text}
            yield Example(entry["question"], answer, columns)


def _made(task: str, options: dict[str, Any]) -> Any:
    """The library's data set. Raises ConfigError."""
    # reasoning-gym imports it, and it tells of its cache folder.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # It leaves a file open.
            from reasoning_gym import create_dataset
            from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError("data=reasoning_gym needs the package reasoning-gym: pip install 'dppo[tasks]'") from None
    if task not in DATASETS:
        raise ConfigError(f"reasoning-gym has no task {task!r} (data.task){did_you_mean(task, DATASETS)}")
    try:
        return create_dataset(task, **options)
    except Exception as error:  # Its checks are assertions, and a wrong name is a TypeError.
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"data.options does not suit data.task={task}: {text}") from None
