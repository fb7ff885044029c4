"""Sums, differences and products of two numbers: a task that needs no download.

    "12+34=" -> "46"        "7-29=" -> "-22"

By default two operands from 0 to 99 and two operations make 20,000 problems, which is what the embedded model knows.
The held-out problems, a tenth, are always the same: they do not depend on a seed, so no run trains a model on problems
that another run evaluates it on.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from operator import add, mul, sub

from dppo_cli.data.task import Task, Warn
from dppo_cli.errors import ConfigError
from dppo_cli.types import Example

HELD_OUT = 0.1
MAX_PROBLEMS = 10**6
COMPUTE = {"+": add, "-": sub, "*": mul}


@dataclass(frozen=True)
class Arithmetic:
    """The first `train_problems` of the training problems and the first `eval_problems` of the held-out ones."""

    train_problems: int
    eval_problems: int
    operands: list[int]
    operations: str
    template: str

    def __post_init__(self) -> None:
        if len(self.operands) != 2 or self.operands[0] > self.operands[1]:
            raise ConfigError(f"data.operands={self.operands} must be [lowest, highest], such as [0,99]")
        if not self.operations or len(set(self.operations) & set(COMPUTE)) != len(self.operations):
            raise ConfigError(f"data.operations={self.operations} is an invalid value; write some of +-*, each once")
        count = len(self.operations) * (self.operands[1] - self.operands[0] + 1) ** 2
        if not 10 <= count <= MAX_PROBLEMS:
            raise ConfigError(f"data.operands={self.operands} make {count} problems; 10 to {MAX_PROBLEMS} can be made")
        for name in ("{a}", "{b}"):
            if name not in self.template:
                raise ConfigError(f"data.template={self.template!r} has no {name}, where an operand goes")
        train, heldout = self._split()
        for key, wanted, available in (
            ("train_problems", self.train_problems, len(train)),
            ("eval_problems", self.eval_problems, len(heldout)),
        ):
            if not 0 < wanted <= available:
                nearest = min(max(wanted, 1), available)
                raise ConfigError(
                    f"data.{key}={wanted}, but the arithmetic task has 1 to {available}; use data.{key}={nearest}"
                )

    def load(self, warn: Warn) -> Task:
        """Make the problems. Both lists are in a mixed order, so a part of a list still covers the whole range."""
        train, heldout = self._split()
        return Task(train[: self.train_problems], heldout[: self.eval_problems])

    def _split(self) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
        return split(self.operands[0], self.operands[1], self.operations, self.template)


@cache
def split(
    lowest: int = 0, highest: int = 99, operations: str = "+-", template: str = "{a}{operation}{b}="
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """All problems as (training, held out), disjoint by prompt and always the same; by default the embedded model's.

    Problems are sorted by the SHA-256 of the prompt. Unlike `random.shuffle`, it is the same in every Python version.
    """
    made = problems(lowest, highest, operations, template)
    ordered = sorted(made, key=lambda problem: sha256(problem.prompt.encode()).digest())
    heldout = round(HELD_OUT * len(ordered))
    return tuple(ordered[heldout:]), tuple(ordered[:heldout])


def problems(lowest: int, highest: int, operations: str, template: str) -> list[Example]:
    """Every problem once, in ascending order of the operands."""
    operands = range(lowest, highest + 1)

    def problem(a: int, operation: str, b: int) -> Example:
        # Not str.format, which would read other braces, too.
        text = template.replace("{a}", str(a)).replace("{b}", str(b)).replace("{operation}", operation)
        return Example(text, str(COMPUTE[operation](a, b)))

    return [problem(a, operation, b) for operation in operations for a in operands for b in operands]
