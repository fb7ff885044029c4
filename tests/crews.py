"""A crew whose workers are threads of this process, for tests that need no others."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from threading import Barrier, Thread
from typing import Any

import make
import torch
from torch import Tensor

from dppo_cli.errors import DppoError
from dppo_cli.processes.crew import Crew, serve
from dppo_cli.processes.line import Line
from dppo_cli.world import World

PATIENCE = 30.0
"""Seconds after which a thread that waits for another gives up, and the test fails."""


@contextmanager
def crew(
    *tables: Mapping[str, Callable[..., Any]] | Callable[[Line], Mapping[str, Callable[..., Any]]],
    warn: Callable[[str], None] = make.fail,
    in_words: Callable[[Exception], DppoError | None] = lambda error: None,
) -> Iterator[Crew]:
    """One that has a worker for each table of methods, or for what makes one of the worker's line."""
    lines, workers = [], []
    for table in tables:
        ours, theirs = Pipe()
        lines.append(Line(ours))
        line = Line(theirs)
        methods = table if isinstance(table, Mapping) else table(line)
        workers.append(Thread(target=_live, args=(line, methods, in_words), daemon=True))
        workers[-1].start()
    yield Crew(World(0, 1 + len(tables)), lines, warn)
    for line in lines:
        line.close()
    for worker in workers:
        worker.join(PATIENCE)
        assert not worker.is_alive(), "a worker ends when its line is closed"


def _live(line: Line, table: Mapping[str, Callable[..., Any]], in_words: Any) -> None:
    with suppress(SystemExit):  # by which a test ends a worker
        serve(line, table, in_words)
    line.close()


class Sums:
    """What `World.sum` is, among threads."""

    def __init__(self, size: int) -> None:
        self.parts: dict[int, list[Tensor]] = {}
        self.all_there, self.all_read = Barrier(size), Barrier(size)

    def sum(self, rank: int, values: list[Tensor]) -> None:
        self.parts[rank] = [value.clone() for value in values]
        self.all_there.wait(PATIENCE)
        totals = [torch.stack(column).sum(0) for column in zip(*self._in_order(), strict=True)]
        self.all_read.wait(PATIENCE)
        for value, total in zip(values, totals, strict=True):
            value.copy_(total)

    def _in_order(self) -> list[list[Tensor]]:
        return [self.parts[rank] for rank in sorted(self.parts)]


@dataclass(frozen=True)
class ThreadWorld(World):
    """A world of threads."""

    sums: Sums | None = None

    def sum(self, values: Any, check: Callable[[], None] = lambda: None) -> None:
        assert self.sums is not None
        self.sums.sum(self.rank, list(values))


def worlds(size: int) -> list[World]:
    sums = Sums(size)
    return [ThreadWorld(rank, size, sums) for rank in range(size)]
