"""Several vLLM servers that share the prompts of a step."""

import threading

import pytest
import vllm_server
from vllm_cases import change, opened, tokens

from dppo_cli.errors import RolloutError

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_servers_share_the_prompts(adapted, server, model) -> None:
    with vllm_server.serving(model) as second:
        with opened(adapted, server, second) as engine:
            both = tokens(engine)
            asked = [len(one.bodies("/completions")) - 2 for one in (server, second)]
            assert asked == [2, 2]
            assert server.adapters() == second.adapters() == [f"{engine.name}-1"]
        with opened(adapted, server) as engine:
            assert tokens(engine) == both


def test_others_go_on_without_one(adapted, server, model) -> None:
    """It gets the adapter and a share again when it is back."""
    said: list[str] = []
    second = vllm_server.serving(model)
    other = second.__enter__()
    with opened(adapted, server, other, warn=said.append) as engine:
        before = tokens(engine)
        second.__exit__(None, None, None)
        assert tokens(engine) == before
        engine.sync(1)
        assert tokens(engine) == before
        assert len(said) == 1
        assert said[0].startswith(f"the vLLM server at {other.url} does not answer (")
        assert said[0].endswith("; 1 other goes on")
        with vllm_server.serving(model, other.server_port) as back:
            engine.sync(2)
            assert tokens(engine) == before
            assert back.adapters() == [f"{engine.name}-3"]
            assert len(back.bodies("/completions")) == 2 + 2, "half of them, and two that were compared"


def test_one_that_comes_back_is_compared_again(adapted, server, model, tiny_models) -> None:
    """Somebody may have started it with another model."""
    second = vllm_server.serving(model)
    other = second.__enter__()
    with opened(adapted, server, other, warn=lambda text: None) as engine:
        tokens(engine)
        second.__exit__(None, None, None)
        tokens(engine)
        with vllm_server.serving(model, other.server_port) as back:
            change(back, 5.0)
            engine.sync(1)
            with pytest.raises(RolloutError, match=f"the vLLM server at {other.url} serves another model"):
                tokens(engine)


def test_one_that_is_away_when_it_is_to_be_compared(adapted, server, model) -> None:
    with vllm_server.serving(model) as second, opened(adapted, server, second, warn=lambda text: None) as engine:
        second.refuse["/completions"] = [(503, "")] * 1000
        assert len(tokens(engine)) == 8
        second.refuse.clear()
        engine.sync(1)
        assert len(tokens(engine)) == 8
        assert [one.compared for one in engine.servers.servers] == [True, True]


def test_requests_at_each_are_limited(adapted, server) -> None:
    most = now = 0
    lock, complete = threading.Lock(), server.complete

    def counted(body):
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        found = complete(body)
        with lock:
            now -= 1
        return found

    server.complete = counted
    with opened(adapted, server, concurrent_prompts=2) as engine:
        tokens(engine)
    assert most == 2
