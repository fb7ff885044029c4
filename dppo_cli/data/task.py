"""What a data source gives: examples to train on, and others to be examined with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Example:
    """One problem: `prompt` as plain text, `answer` for the reward, `columns` for a reward function that wants more."""

    prompt: str
    answer: str
    columns: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Training problems and held-out problems."""

    train: Sequence[Example]
    heldout: Sequence[Example]


class DataSource(Protocol):
    """A data option: `load()` reads or makes the problems and raises `DataError` where it cannot."""

    def load(self) -> Task: ...
