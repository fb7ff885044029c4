"""The interface of data sources: training examples and held-out examples."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from dppo_cli.types import Example

Warn = Callable[[str], None]
"""Takes what a user should know, such as how many rows were dropped."""


@dataclass(frozen=True)
class Task:
    """Training problems and held-out problems."""

    train: Sequence[Example]
    heldout: Sequence[Example]


class DataSource(Protocol):
    """A data option: `load(warn)` reads or makes the problems, and raises `DataError` if it cannot."""

    def load(self, warn: Warn) -> Task: ...
