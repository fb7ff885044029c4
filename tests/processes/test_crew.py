"""What a main process asks its workers, and what it hears from them."""

import time
from collections.abc import Iterator
from threading import Event
from typing import Any

import pytest
from crews import crew

from dppo_cli.errors import ConfigError, NumericalError, RunError
from dppo_cli.processes.crew import WARNING, Crew
from dppo_cli.processes.line import Line
from dppo_cli.world import World


def test_each_worker_does_its_own_part() -> None:
    tables = [{"add": lambda a, b, rank=rank: (rank, a + b)} for rank in (1, 2)]
    with crew(*tables) as workers:
        workers.begin("add", [(1, 2), (30, 40)])
        assert workers.ended() == [(1, 3), (2, 70)]
        workers.begin_all("add", 5, 6)
        assert workers.ended() == [(1, 11), (2, 11)]
        assert workers.size == 3


def test_a_crew_of_one_has_nobody_to_wait_for() -> None:
    alone = Crew(World(), [], print)
    alone.begin_all("load")
    assert alone.ended() == [] and list(alone.parts()) == [] and alone.size == 1


def test_parts_come_before_the_end() -> None:
    go_on = Event()

    def letters() -> Iterator[str]:
        yield "a"
        assert go_on.wait(30)
        yield "b"

    with crew({"letters": letters}) as workers:
        workers.begin_all("letters")
        found = workers.parts()
        assert next(found) == "a"
        assert list(workers.parts(0)) == [], "nothing is there, and it does not wait"
        go_on.set()
        assert list(found) == ["b"]
        assert workers.ended() == [None]


def test_an_error_is_raised_once_all_have_ended() -> None:
    ended = []

    def slow() -> str:
        time.sleep(0.2)
        ended.append(True)
        return "done"

    def fails() -> None:
        raise NumericalError("the loss is nan", [3])

    with crew({"work": fails}, {"work": slow}) as workers:
        workers.begin_all("work")
        with pytest.raises(NumericalError, match="the loss is nan") as raised:
            workers.ended()
        assert ended and raised.value.tokens == [3]
        workers.begin_all("work")
        with pytest.raises(NumericalError):
            workers.ended()


def test_other_errors_are_shown_where_they_happen(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise LookupError("no such thing")

    with crew({"work": fails}) as workers:
        workers.begin_all("work")
        with pytest.raises(RuntimeError, match=r"^process 2 of 2: LookupError: no such thing$"):
            workers.ended()
    assert 'raise LookupError("no such thing")' in capfd.readouterr().err


def test_errors_that_can_be_put_in_words(capfd: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        raise MemoryError

    with crew({"work": fails}, in_words=lambda error: ConfigError(f"less of it: {error!r}")) as workers:
        workers.begin_all("work")
        with pytest.raises(ConfigError, match="less of it: MemoryError"):
            workers.ended()
    assert capfd.readouterr().err == ""


def test_warnings_come_beside_the_answer_and_the_same_once() -> None:
    heard: list[str] = []

    def table(line: Line) -> dict[str, Any]:
        def work() -> Iterator[str]:
            line.send((WARNING, "no Triton"))
            line.send((WARNING, "low on memory"))
            yield "part"

        return {"work": work}

    with crew(table, table, warn=heard.append) as workers:
        workers.warned = ["no Triton"]  # the main process has none either
        for _ in range(2):
            workers.begin_all("work")
            assert list(workers.parts()) == ["part"] * 2
            assert workers.ended() == [None] * 2
    assert len(heard) == 1 and heard[0] in [f"process {n} of 3: low on memory" for n in (2, 3)]


def test_a_request_that_a_worker_does_not_know() -> None:
    with crew({}) as workers:
        workers.begin_all("nonsense")
        with pytest.raises(RuntimeError, match=r"^process 2 of 2: KeyError: 'nonsense'$"):
            workers.ended()


def test_what_was_not_waited_for_does_not_answer_the_next_question() -> None:
    with crew({"count": lambda n: n}) as workers:
        workers.begin_all("count", 1)
        workers.begin_all("count", 2)
        assert workers.ended() == [2]


def test_a_worker_that_ends_is_told_of_with_what_it_was() -> None:
    def ends() -> None:
        raise SystemExit  # not an Exception, so its thread ends

    with crew({"work": ends}, {"work": lambda: None}) as workers:
        workers.how_ended = lambda number: f"worker {number} was killed"
        workers.begin_all("work")
        with pytest.raises(RunError, match=r"^process 2 of 3 has ended: worker 0 was killed$"):
            workers.ended()
        with pytest.raises(RunError, match="process 2 of 3 has ended"):
            workers.begin_all("work")
