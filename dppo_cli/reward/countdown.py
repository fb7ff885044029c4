"""Reward 1 for an equation that reaches the target with the given numbers, else 0."""

import ast
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import regex  # type: ignore[import-untyped]

from dppo_cli.reward.patterns import TooSlowError, compiled, last_match
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Completion, Prompt, Score

KEY = "reward.pattern"
LONGEST = 200
"""Characters of an expression that is still read."""
SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "[": "(", "]": ")", "{": "(", "}": ")"})


@dataclass(frozen=True)
class Countdown:
    """See conf/reward/countdown.yaml for the fields."""

    numbers_column: str
    target_column: str
    pattern: str | None
    use_all: bool

    def __post_init__(self) -> None:
        if self.pattern is not None:
            compiled(KEY, self.pattern)

    def load(self, warn: Callable[[str], None]) -> Scorer:
        return self._scores

    def _scores(self, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        return [
            [self._score(c.text, prompt.example.columns) for c in group]
            for prompt, group in zip(prompts, completions, strict=True)
        ]

    def _score(self, text: str, row: Any) -> Score:
        numbers = _integers(row.get(self.numbers_column))
        target = _integers(row.get(self.target_column))
        if not numbers or len(target) != 1:
            return Score(None, note=f"the row has no {self.numbers_column} and {self.target_column}")
        try:
            found = text if self.pattern is None else last_match(KEY, compiled(KEY, self.pattern), text)
        except TooSlowError as error:
            return Score(None, note=str(error))
        if found is None:
            return Score(0.0, note="no expression was found")
        expression = found.partition("=")[0].strip()
        try:
            value, used = evaluated(expression)
        except ValueError as error:
            return Score(0.0, note=str(error))
        spare = Counter(numbers)
        spare.subtract(used)
        if min(spare.values()) < 0 or (self.use_all and max(spare.values()) > 0):
            return Score(0.0, note="it does not use the numbers once each", answer=expression)
        return Score(float(value == target[0]), answer=expression)


def evaluated(expression: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression of whole numbers, + - * / and brackets, and its numbers. Raises ValueError."""
    if len(expression) > LONGEST:
        raise ValueError(f"the expression is longer than {LONGEST} characters")
    used: list[int] = []

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Expression(body):
                return value(body)
            case ast.Constant(int(number)) if type(number) is int:
                used.append(number)
                return Fraction(number)
            case ast.UnaryOp(ast.USub(), operand):
                return -value(operand)
            case ast.UnaryOp(ast.UAdd(), operand):
                return value(operand)
            case ast.BinOp(left, ast.Add(), right):
                return value(left) + value(right)
            case ast.BinOp(left, ast.Sub(), right):
                return value(left) - value(right)
            case ast.BinOp(left, ast.Mult(), right):
                return value(left) * value(right)
            case ast.BinOp(left, ast.Div(), right):
                return value(left) / value(right)
        raise ValueError("the expression is not one of whole numbers, + - * / and brackets")

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Of what is odd Python.
            return value(ast.parse(expression.translate(SIGNS), mode="eval")), used
    except ZeroDivisionError:
        raise ValueError("the expression divides by zero") from None
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("the expression cannot be read") from None


def _integers(cell: Any) -> list[int]:
    """Of a list of numbers, a number, or a text of them."""
    return [int(number) for number in regex.findall(r"-?\d{1,18}", str(cell))] if cell is not None else []
