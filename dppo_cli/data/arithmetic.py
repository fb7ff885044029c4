"""Addition and subtraction of numbers of up to two digits: the task that needs no download.

    "12+34=" -> "46"        "7-29=" -> "-22"

Two operands from 0 to 99 and two operations make 20,000 problems. Which of them are held out is part of the task, not
of a run: it depends on no seed, so a model trained in one run was never shown what another run examines it with.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256

from dppo_cli.data.task import Example, Task
from dppo_cli.errors import ConfigError

OPERANDS = range(100)
HELD_OUT = 2_000  # of the 20,000


@dataclass(frozen=True)
class Arithmetic:
    """The first `train_problems` of the 18,000 to train on, and the first `eval_problems` of the 2,000 held out."""

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
        """Make the problems. Both lists come in a mixed order, so a smaller number still covers the whole range."""
        train, heldout = split()
        return Task(train[: self.train_problems], heldout[: self.eval_problems])


@cache
def split() -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """All 20,000 problems as (18,000 to train on, 2,000 held out), disjoint by prompt and always the same.

    The order is that of each prompt's SHA-256, which, unlike `random.shuffle`, no Python version can change.
    """
    ordered = sorted(problems(), key=lambda problem: sha256(problem.prompt.encode()).digest())
    return tuple(ordered[HELD_OUT:]), tuple(ordered[:HELD_OUT])


def problems() -> list[Example]:
    """Every problem once, in counting order."""
    return [
        Example(f"{a}{operation}{b}=", str(a + b if operation == "+" else a - b), columns={})
        for operation in "+-"
        for a in OPERANDS
        for b in OPERANDS
    ]
