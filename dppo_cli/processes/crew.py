"""The main process and its workers: it alone runs the loop, and asks them for their share of the work.

A worker has what the main process has: policy, sampler and learner. It does what it is asked for and answers, and ends
when its line is closed, whatever became of the main process.
"""

import traceback
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from multiprocessing import connection
from typing import Any

from dppo_cli.errors import DppoError, RunError
from dppo_cli.processes.line import Line
from dppo_cli.world import World

PART, DONE, FAILED, WARNING = "part", "done", "failed", "warning"
"""What a worker says to the main process: each with a value, an error or a text."""
ENDING = 2.0
"""Seconds from the first sign that a process ends to its end."""


class Crew:
    """The workers of a main process, by their lines. One request at a time.

    Example: `crew.begin("scale", [(2,), (3,)])` asks two workers for different things, `crew.ended()` waits for both
    and gives what they returned, in their order.
    """

    def __init__(
        self,
        world: World,
        lines: Sequence[Line],
        warn: Callable[[str], None],
        how_ended: Callable[[int], str] = lambda number: "what it wrote last says why",
    ) -> None:
        """`warn` is told what workers warn of, the same once. `how_ended`: of a worker that has ended, in words."""
        self.world, self.lines, self.warn, self.how_ended = world, lines, warn, how_ended
        self.warned: Container[str] = ()  # what the main process has warned of itself
        self.told: set[str] = set()
        # By worker, of the latest request. Before the first there is nothing to wait for.
        self.answers: dict[int, tuple[str, Any]] = dict.fromkeys(range(len(lines)), (DONE, None))

    @property
    def size(self) -> int:
        """Processes, this one included."""
        return self.world.size

    def begin(self, name: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        """Ask each worker for `name` with arguments of its own, once all have answered to what was asked before."""
        for _ in self.parts():
            pass
        self.answers = {}
        for line, given in zip(self.lines, arguments, strict=True):
            line.send((name, given))

    def begin_all(self, name: str, *arguments: Any) -> None:
        """Ask all of them for the same."""
        self.begin(name, [arguments] * len(self.lines))

    def parts(self, patience: float | None = None) -> Iterator[Any]:
        """What workers give before they have ended: until they have, or nothing has come for so many seconds."""
        while len(self.answers) < len(self.lines):
            waiting: dict[Any, int] = {line: n for n, line in enumerate(self.lines) if n not in self.answers}
            ready: Any = connection.wait(list(waiting), patience)  # Python's signals are heard meanwhile
            if not ready:
                return
            for line in ready:
                try:
                    kind, value = line.receive()
                except (EOFError, OSError):
                    raise self._lost(waiting[line]) from None
                if kind == WARNING:
                    self._pass_on(value, waiting[line])
                elif kind == PART:
                    yield value
                else:
                    self.answers[waiting[line]] = (kind, value)

    def ended(self) -> list[Any]:
        """What the workers return, in their order. Raises what one of them has raised, once all have ended."""
        self.check(None)
        return [self.answers[number][1] for number in range(len(self.lines))]

    def check(self, patience: float | None = 0) -> None:
        """Raise what a worker has raised, or that one has ended; wait for that as `parts` does, and drop parts."""
        for _ in self.parts(patience):
            pass
        for number, (kind, value) in sorted(self.answers.items()):
            if kind == FAILED and isinstance(value, DppoError):
                raise value
            if kind == FAILED:
                raise RuntimeError(f"process {number + 2} of {self.size}: {value}")

    def _pass_on(self, warning: str, number: int) -> None:
        """Most are about what all processes have, and each of them warns of it."""
        if warning not in self.told and warning not in self.warned:
            self.told.add(warning)
            self.warn(f"process {number + 2} of {self.size}: {warning}")

    def _lost(self, number: int) -> RunError:
        return RunError(f"process {number + 2} of {self.size} has ended: {self.how_ended(number)}")


def serve(
    line: Line,
    methods: Mapping[str, Callable[..., Any]],
    in_words: Callable[[Exception], DppoError | None] = lambda error: None,
) -> None:
    """A worker's life: do what the main process asks for until its line is closed.

    A method that returns an iterator gives each of its elements at once. An error is the main process's to handle:
    one of ours, or what `in_words` makes of it. Of others a trace is printed here, where it was raised.
    """
    while True:
        try:
            name, arguments = line.receive()
            for kind, value in _answer(methods, name, arguments):
                if kind != FAILED:
                    line.send((kind, value))
                elif not line.has_something():  # else the main process has ended, and has said why
                    line.send((FAILED, _told(value, in_words)))
        except (EOFError, OSError):  # of the line
            return


def _answer(
    methods: Mapping[str, Callable[..., Any]], name: str, arguments: tuple[Any, ...]
) -> Iterator[tuple[str, Any]]:
    """The messages that a request leads to."""
    try:
        result = methods[name](*arguments)
        if isinstance(result, Iterator):
            for part in result:
                yield PART, part
            result = None
    except Exception as error:
        yield FAILED, error
    else:
        yield DONE, result


def _told(error: Exception, in_words: Callable[[Exception], DppoError | None]) -> Exception:
    told = error if isinstance(error, DppoError) else in_words(error)
    if told is None:
        traceback.print_exception(error)
    return told or RuntimeError(f"{type(error).__name__}: {error}")
