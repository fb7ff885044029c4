"""vLLM servers that keep their connections and answer nothing, and those that only take long."""

import re
import time

import pytest
import vllm_server
from vllm_cases import opened, tokens

from dppo_cli.errors import RolloutError
from dppo_cli.rollout import vllm_gone

pytestmark = pytest.mark.usefixtures("short_pauses", "_short_questions")
QUESTIONS = 0.5


@pytest.fixture
def _short_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_gone, "CONNECTING", QUESTIONS)


def test_the_only_one_ends_the_run(adapted, server) -> None:
    """Long before rollout.timeout, in the words for a server that is not there."""
    said: list[str] = []
    with opened(adapted, server, patience=1.0, timeout=300.0, warn=said.append) as engine:
        tokens(engine)
        server.runs.clear()
        begun = time.monotonic()
        match = rf"at {server.url} for rollout.patience=1 seconds \(it has answered nothing for [2-9] seconds\); start"
        with pytest.raises(RolloutError, match=match):
            tokens(engine)
        assert time.monotonic() - begun < 15
        server.runs.set()
    assert len(said) == 1
    match = rf"the vLLM server at {server.url} does not answer \(it has answered nothing for [1-9] seconds\); waiting 1"
    assert re.match(match, said[0])


def test_the_only_one_wakes_up(adapted, server) -> None:
    said: list[str] = []

    def wake(text: str) -> None:
        said.append(text)
        server.runs.set()

    with opened(adapted, server, patience=2.0, timeout=300.0, warn=wake) as engine:
        before = tokens(engine)
        server.runs.clear()
        assert tokens(engine) == before
    assert len(said) == 1


def test_others_take_over(adapted, server, model) -> None:
    """What waits for its turn there, too; and a new adapter does not wait for it as long again."""
    said: list[str] = []
    with vllm_server.serving(model) as second:
        many = dict(concurrent_prompts=1, patience=4.0, timeout=300.0)
        with opened(adapted, server, second, **many, warn=said.append) as engine:
            before = tokens(engine)
            second.runs.clear()
            begun = time.monotonic()
            assert tokens(engine) == before
            assert 3.5 < time.monotonic() - begun < 15
            begun = time.monotonic()
            engine.sync(1)
            assert time.monotonic() - begun < 3.5
            assert tokens(engine) == before
            assert [text.split(" (")[0] for text in said] == [f"the vLLM server at {second.url} does not answer"]
            second.runs.set()
            asked = len(second.bodies("/completions"))
            engine.sync(2)
            assert tokens(engine) == before
            assert len(second.bodies("/completions")) - asked == 2 + 2, "half of them, and two that were compared"


def test_one_that_is_busy_is_none(adapted, server) -> None:
    """It says what it serves while it samples for longer than the patience."""
    with opened(adapted, server, patience=1.0, timeout=300.0) as engine:
        before = tokens(engine)
        asked, complete = len(server.bodies("/v1/models")), server.complete

        def slow(body):
            time.sleep(4.0)
            return complete(body)

        server.complete = slow
        assert tokens(engine) == before
        assert len(server.bodies("/v1/models")) - asked >= 3


def test_nothing_is_asked_of_one_that_has_nothing_to_do(adapted, server) -> None:
    with opened(adapted, server) as engine:
        tokens(engine)
        time.sleep(QUESTIONS)
        asked = len(server.asked)
        time.sleep(4 * QUESTIONS)
        assert len(server.asked) == asked
