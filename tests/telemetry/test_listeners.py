"""A listener that fails is named once, hears no more, and never reaches the run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dppo_cli.telemetry.listeners import Listeners
from dppo_cli.types import EvalReport, RunInfo, StepReport

RUN = RunInfo(Path("run"), 0, 3, "some/model", 10, 2, "cpu", "float32", "merged weights")
EVALUATION = EvalReport(0, "held_out", 0.5, 0.1, (0.4, 0.6), [])
STEP = StepReport({"step": 1}, [], [])
SUMMARY = {"steps": 1}

EVENTS: dict[str, Any] = {
    "started": RUN,
    "evaluated": EVALUATION,
    "stepped": STEP,
    "warned": "careful",
    "finished": SUMMARY,
}
"""Each event with what it says."""


class Recorder:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    def started(self, run: RunInfo) -> None:
        self.hear("started", run)

    def evaluated(self, report: EvalReport) -> None:
        self.hear("evaluated", report)

    def stepped(self, report: StepReport) -> None:
        self.hear("stepped", report)

    def warned(self, text: str) -> None:
        self.hear("warned", text)

    def finished(self, summary: Mapping[str, Any] | None) -> None:
        self.hear("finished", summary)

    def hear(self, event: str, said: Any) -> None:
        self.heard.append((event, said))

    def warnings(self) -> list[str]:
        return [said for event, said in self.heard if event == "warned"]


class Broken(Recorder):
    """Raises at one of the events, each time."""

    def __init__(self, event: str, error: BaseException) -> None:
        super().__init__()
        self.event, self.error = event, error

    def hear(self, event: str, said: Any) -> None:
        super().hear(event, said)
        if event == self.event:
            raise self.error


def tell(listeners: Listeners, *events: str) -> None:
    for event in events:
        getattr(listeners, event)(EVENTS[event])


def test_everyone_hears_everything_in_order() -> None:
    first, second = Recorder(), Recorder()
    tell(Listeners([first, second]), *EVENTS)
    assert first.heard == second.heard == list(EVENTS.items())


def test_nobody_needs_to_listen() -> None:
    tell(Listeners([]), *EVENTS)
    tell(Listeners([Broken("warned", ValueError())]), "warned", "warned")


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_one_that_fails_is_named_once_and_hears_no_more(event: str, position: int) -> None:
    """Whatever its position among the others, which miss nothing."""
    broken, others = Broken(event, ValueError("disk full")), [Recorder(), Recorder()]
    listeners = Listeners([*others[:position], broken, *others[position:]])
    tell(listeners, *EVENTS)
    tell(listeners, *EVENTS)
    text = "Broken failed and is switched off: ValueError: disk full"
    for other in others:
        assert other.warnings().count(text) == 1
        told = [heard for heard in other.heard if heard != ("warned", text)]
        assert told == list(EVENTS.items()) * 2
    # It may hold a terminal or a connection, so it hears of an end.
    assert broken.heard == [*list(EVENTS.items())[: list(EVENTS).index(event) + 1], ("finished", None)]


def test_the_warning_comes_at_once() -> None:
    """So that a person reads it beside the step in which it happened."""
    other = Recorder()
    listeners = Listeners([Broken("started", OSError("gone")), other])
    tell(listeners, "started", "stepped")
    text = "Broken failed and is switched off: OSError: gone"
    assert other.heard == [("warned", text), ("started", RUN), ("stepped", STEP)]


@pytest.mark.parametrize("event", EVENTS)
def test_one_that_fails_while_it_hears_of_another_is_named_too(event: str) -> None:
    class AlsoBroken(Broken):
        pass

    first, second, third = Broken(event, ValueError("a")), AlsoBroken("warned", TypeError("b")), Recorder()
    listeners = Listeners([first, second, third])
    tell(listeners, event, event)
    assert sorted(text for text in third.warnings() if "failed" in text) == [
        "AlsoBroken failed and is switched off: TypeError: b",
        "Broken failed and is switched off: ValueError: a",
    ]
    assert [heard for heard in third.heard if heard == (event, EVENTS[event])] == [(event, EVENTS[event])] * 2
    assert listeners.listening == [third]


def test_all_may_fail() -> None:
    listeners = Listeners(
        [Broken("stepped", ValueError()), Broken("warned", ValueError()), Broken("stepped", OSError())]
    )
    tell(listeners, *EVENTS, *EVENTS)
    assert listeners.listening == []


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_passes(event: str, interruption: Callable[[], BaseException]) -> None:
    """It is meant for the run, whoever is at work when it comes."""
    broken, other = Broken(event, interruption()), Recorder()
    listeners = Listeners([broken, other])
    with pytest.raises(type(interruption())):
        tell(listeners, event)
    assert listeners.listening == [broken, other] and other.warnings() == []
