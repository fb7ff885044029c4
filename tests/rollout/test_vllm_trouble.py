"""vLLM servers that fail again and again, or seldom; and what they would not take."""

import threading
import time
from dataclasses import replace

import make
import pytest
import vllm_server
from engines import sampling
from vllm_cases import change, opened, tokens

from dppo_cli.errors import RolloutError
from dppo_cli.rollout import vllm_gone
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.vllm_gone import Attempts, GoneError
from dppo_cli.types import Status

pytestmark = pytest.mark.usefixtures("short_pauses")


def ignore(text: str) -> None: ...


def test_a_request_that_kills_the_server_each_time_ends_the_run(adapted, server) -> None:
    """Somebody starts it again, it takes the adapter, and dies of the next request."""
    with opened(adapted, server, patience=0.5, concurrent_prompts=1, warn=ignore) as engine:
        tokens(engine)

        def dies(body):
            if body["model"] in server.models:
                server.forget()
                return 503, ""
            return 404, vllm_server.error("The model does not exist.", "NotFoundError")

        server.complete = dies
        begun = time.monotonic()
        with pytest.raises(RolloutError, match=r"no vLLM server has answered at .* for rollout.patience=0.5 seconds"):
            tokens(engine)
        assert time.monotonic() - begun < 10


def test_failures_far_apart_are_no_absence(monkeypatch) -> None:
    """An attempt that was worked on for longer than the patience begins the count anew; one that found nobody not."""
    now = 0.0
    monkeypatch.setattr(vllm_gone.time, "monotonic", lambda: now)
    for heard, expected in ((True, [False, False, True]), (False, [False, True, True])):
        attempts, found = Attempts(10.0), []
        for begun, ended in ((0.0, 1.0), (2.0, 100.0), (100.0, 111.0 if heard else 101.0)):
            now = begun
            attempts.begin()
            now = ended
            found.append(attempts.over(GoneError("away", heard and ended == 100.0)))
        assert found == expected


def test_one_that_comes_back_as_another_in_the_middle_of_a_step(adapted, server) -> None:
    """None of its samples is used."""
    with opened(adapted, server, warn=ignore, concurrent_prompts=1) as engine:
        tokens(engine)
        complete, asked = server.complete, 0

        def restarts(body):
            nonlocal asked
            asked += 1
            if asked == 1:
                server.forget()
                change(server, 5.0)
                return 503, ""
            return complete(body)

        server.complete = restarts
        prompts = make.prompts(adapted)
        with pytest.raises(RolloutError, match="serves another model than"):
            next(engine.generate(prompts, 2, sampling(), 0, seed=1))


def test_one_that_was_started_again_between_two_requests_is_compared_again(adapted, server) -> None:
    """No request found it away; it only lacks the adapter."""
    with opened(adapted, server) as engine:
        tokens(engine)
        server.forget()
        change(server, 5.0)
        with pytest.raises(RolloutError, match="serves another model than"):
            tokens(engine)


def test_nothing_is_left_in_a_server_that_was_left_in_a_hurry(adapted, server) -> None:
    """Requests that wait would load their adapter again."""
    with opened(adapted, server, concurrent_prompts=1, ahead=1) as engine:
        tokens(engine)
        engine.sync(1)
        unload = server.unload
        server.unload = lambda body: (time.sleep(0.2), unload(body))[1]
        server.hold.clear()
        engine.generate(make.prompts(adapted), 2, sampling(), 0, seed=1)
        threading.Timer(0.1, server.hold.set).start()
    until = time.monotonic() + 10
    while server.adapters() and time.monotonic() < until:
        time.sleep(0.02)
    assert server.adapters() == []


def test_one_that_hangs_while_others_work(adapted, server, model) -> None:
    said: list[str] = []
    with vllm_server.serving(model) as second:
        with opened(adapted, server, second, timeout=5.0, warn=said.append) as engine:
            before = tokens(engine)
            second.hold.clear()
            assert tokens(engine) == before
        assert [text.split(" (")[0] for text in said] == [f"the vLLM server at {second.url} does not answer"]
        assert "within rollout.timeout=5 seconds" in said[0]


def test_greedy_samples_are_equal(adapted, server) -> None:
    """vLLM takes one of them a request."""
    how = sampling(temperature=0.0)
    prompts = make.prompts(adapted)
    with opened(adapted, server) as engine:
        completions = in_order(engine.generate(prompts, 3, how, 0, seed=1))
    assert [len(row) for row in completions] == [3] * len(prompts)
    assert all(len({tuple(one) for one in make.tokens([row])}) == 1 for row in completions)
    assert {body["n"] for body in server.bodies("/completions")} == {1}


def test_a_temperature_that_vllm_would_raise(adapted, server) -> None:
    with (
        opened(adapted, server) as engine,
        pytest.raises(RolloutError, match=r"a temperature of 0.005 is 0.01 for vLLM"),
    ):
        engine.generate(make.prompts(adapted), 1, sampling(temperature=0.005), 0, seed=1)


def test_what_the_server_says_has_ended_has_ended(adapted, server) -> None:
    """A stop string that the whole decoded text no longer shows, with a space at its beginning."""
    choice = server.choice

    def stopped(*how):
        return {**choice(*how), "finish_reason": "stop"}

    with opened(adapted, server) as engine:
        tokens(engine)
        server.choice = stopped
        how = replace(sampling(max_new_tokens=3), stop=[" never"])
        completions = make.flat(in_order(engine.generate(make.prompts(adapted), 2, how, 0, seed=1)))
    assert {one.status for one in completions} == {Status.FINISHED}
