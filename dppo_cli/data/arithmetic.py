"""Addition and subtraction of numbers of up to two digits: a task that needs no download.

    "12+34=" -> "46"        "7-29=" -> "-22"

Two operands from 0 to 99 and two operations make 20,000 problems. The held-out problems are always the same: they do
not depend on a seed, so no run trains a model on problems that another run evaluates it on.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256

from dppo_cli.data.task import Task
from dppo_cli.errors import ConfigError
from dppo_cli.types import Example

OPERANDS = range(100)
HELD_OUT = 2_000  # of the 20,000


@dataclass(frozen=True)
class Arithmetic:
    """The first `train_problems` of 18,000 training problems and the first `eval_problems` of 2,000 held-out ones."""

    train_problems: int
    eval_problems: int

    def __post_init__(self) -> None:
        train, heldout = split()
        for key, wanted, available in (
            ("train_problems", self.train_problems, len(train)),
            ("eval_problems", self.eval_problems, len(heldout)),
        ):
            if not 0 < wanted <= available:
                nearest = min(max(wanted, 1), available)
                raise ConfigError(
                    f"data.{key}={wanted}, but the arithmetic task has 1 to {available}; use data.{key}={nearest}"
                )

    def load(self) -> Task:
        """Make the problems. Both lists are in a mixed order, so a part of a list still covers the whole range."""
        train, heldout = split()
        return Task(train[: self.train_problems], heldout[: self.eval_problems])


@cache
def split() -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """All 20,000 problems as (18,000 training, 2,000 held out), disjoint by prompt and always the same.

    Problems are sorted by the SHA-256 of the prompt. Unlike `random.shuffle`, it is the same in every Python version.
    """
    ordered = sorted(problems(), key=lambda problem: sha256(problem.prompt.encode()).digest())
    return tuple(ordered[HELD_OUT:]), tuple(ordered[:HELD_OUT])


def problems() -> list[Example]:
    """Every problem once, in ascending order of the operands."""
    return [
        Example(f"{a}{operation}{b}=", str(a + b if operation == "+" else a - b))
        for operation in "+-"
        for a in OPERANDS
        for b in OPERANDS
    ]
