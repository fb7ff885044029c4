"""vLLM servers that are absent, restart, die, refuse, or serve something else."""

import threading
import time
from concurrent.futures import CancelledError
from contextlib import suppress

import make
import pytest
import vllm_server
from engines import sampling
from vllm_cases import OPTIONS, change, opened, tokens
from vllm_server import error

from dppo_cli.errors import ConfigError, RolloutError
from dppo_cli.rollout.vllm import VLLMRollout

pytestmark = pytest.mark.usefixtures("short_pauses")

NOBODY = "http://127.0.0.1:9"
"""Of the discard service, which no machine runs any more."""
BUSY = (503, error("starting"))


# At the start


def test_nobody_answers(adapted, model, capsys) -> None:
    """What to start is said at once, and again when it was not started in time."""
    with pytest.raises(RolloutError) as caught, opened(adapted, url=NOBODY, patience=0.1):
        pass
    said = capsys.readouterr().err.splitlines()
    start = (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {model} --dtype float32 --logprobs-mode processed_logprobs "
        "--max-logprobs 20 --port 9 --no-enable-chunked-prefill --enable-lora --max-lora-rank 8"
    )
    refused = "[Errno 111] Connection refused"
    assert said[-1:] == [f"dppo: no vLLM server answers at {NOBODY} ({refused}); waiting 0.1 seconds for one: {start}"]
    assert str(caught.value) == (
        f"no vLLM server has answered at {NOBODY} for rollout.patience=0.1 seconds ({refused}); start one: {start}; or "
        "sample in this process: rollout=local (a run that goes on cannot; its rollout.url may change)"
    )


def test_a_server_that_starts_late_is_waited_for(adapted, server, capsys) -> None:
    capsys.readouterr()
    server.refuse["/v1/models"] = [BUSY] * 3
    with opened(adapted, server) as engine:
        assert len(tokens(engine)) == 8
    [said] = capsys.readouterr().err.splitlines()
    assert "503 starting" in said


def test_something_else_answers(adapted, server) -> None:
    server.refuse["/v1/models"] = [(200, {"hello": "world"})]
    with pytest.raises(RolloutError, match=rf"what answers at rollout.url={server.url} is no vLLM server: .*hello"):
        VLLMRollout(server.url, **OPTIONS).load(adapted, make.fail)


def test_another_model(adapted, server) -> None:
    change(server, 5.0)
    match = r"serves another model than .*/llama3: base, with log-probs that differ by .* nats a token; start it with"
    with pytest.raises(RolloutError, match=match), opened(adapted, server) as engine:
        tokens(engine)


def test_log_probs_without_the_temperature(adapted, server) -> None:
    server.processed = False
    match = "reports log-probs without the temperature; start it with: .*--logprobs-mode processed_logprobs"
    with pytest.raises(RolloutError, match=match), opened(adapted, server) as engine:
        tokens(engine)


def test_weights_a_little_different(adapted, server) -> None:
    """As a quantised copy of them has: told once, not refused."""
    said: list[str] = []
    change(server, 0.7)
    with opened(adapted, server, warn=said.append) as engine:
        tokens(engine)
        engine.sync(1)
        tokens(engine)
    assert len(said) == 1
    assert said[0].endswith("compare model, precision and quantisation of both")


def test_keys(adapted, server, monkeypatch) -> None:
    """The key goes to the server and nowhere else."""
    server.key = "sesame"
    with pytest.raises(RolloutError) as caught:
        VLLMRollout(server.url, **OPTIONS).load(adapted, make.fail)
    none = (
        f"the vLLM server at {server.url} wants an API key, and none was sent: rollout.api_key_env is null; export "
        "VLLM_API_KEY=..., and name this variable: rollout.api_key_env=VLLM_API_KEY"
    )
    assert str(caught.value) == none
    named = {**OPTIONS, "api_key_env": "VLLM_TEST_KEY"}
    monkeypatch.delenv("VLLM_TEST_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"api_key_env=VLLM_TEST_KEY, but .*; export VLLM_TEST_KEY="):
        VLLMRollout(server.url, **named).load(adapted, make.fail)
    monkeypatch.setenv("VLLM_TEST_KEY", "wrong")
    with pytest.raises(RolloutError, match=r"wants another key than that which rollout.api_key_env names"):
        VLLMRollout(server.url, **named).load(adapted, make.fail)
    server.key = None
    with opened(adapted, server) as engine:
        server.key = "sesame"
        with pytest.raises(RolloutError) as caught:
            engine.sync(1)
        assert str(caught.value) == none
    server.key = "sesame"
    monkeypatch.setenv("VLLM_TEST_KEY", "sesame")
    with opened(adapted, server, api_key_env="VLLM_TEST_KEY") as engine:
        assert len(tokens(engine)) == 8
        server.refuse["/completions"] = [(400, error("no, sesame is wrong"))]
        with pytest.raises(RolloutError, match=r"refuses: 400 no, \*\*\* is wrong"):
            tokens(engine)


def test_a_server_that_gives_responses_up(adapted, server) -> None:
    server.abort = 1
    with pytest.raises(RolloutError, match="gives responses up; see what it prints"), opened(adapted, server) as engine:
        tokens(engine)


# Adapters


def test_a_server_that_takes_no_adapters(adapted, server) -> None:
    server.updating = False
    match = "takes no adapters while it runs; start it with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve"
    with pytest.raises(RolloutError, match=match), opened(adapted, server):
        pass


def test_a_server_that_does_not_see_the_folder(adapted, server) -> None:
    server.load = lambda body: (404, error(f"No adapter found for {body['lora_path']}"))
    match = r"does not find /.*; on another machine it has to see this folder .* rollout.adapters=FOLDER"
    with pytest.raises(RolloutError, match=match), opened(adapted, server):
        pass


def test_an_adapter_of_too_high_a_rank(adapted, server) -> None:
    # With a status 500, as servers have that have lost their engine.
    server.load = lambda body: (500, error("LoRA rank 4 is greater than max_lora_rank 2."))
    match = r"refuses: 500 LoRA rank 4 is greater than max_lora_rank 2.; start it with: .*--max-lora-rank 8"
    with pytest.raises(RolloutError, match=match), opened(adapted, server):
        pass


def test_an_adapter_of_a_model_of_another_shape(adapted, server) -> None:
    """Told at once: no time heals it."""
    said = "Call to add_lora method failed: Worker failed with error 'The size of tensor a (64) must match b (128)'"
    server.load = lambda body: (500, error(said))
    match = r"refuses: 500 Call to add_lora .*; start it with: .* vllm serve /"
    with pytest.raises(RolloutError, match=match), opened(adapted, server):
        pass


def test_lists_longer_than_the_server_gives(adapted, server) -> None:
    server.longest_list = 3
    with opened(adapted, server) as engine, pytest.raises(RolloutError, match=r"greater than max .*--max-logprobs 20"):
        list(engine.generate(make.prompts(adapted), 1, sampling(), 4, seed=1))


def test_a_server_that_was_started_again_gets_the_adapter_again(adapted, server) -> None:
    with opened(adapted, server) as engine:
        before = tokens(engine)
        server.forget()
        assert tokens(engine) == before
        assert server.adapters() == [f"{engine.name}-1"]
        assert len(server.bodies("/load_lora_adapter")) >= 2


def test_a_server_that_loses_it_again_and_again(adapted, server) -> None:
    with opened(adapted, server) as engine:
        load = server.load
        server.forget()
        server.load = lambda body: (200, "")
        with pytest.raises(RolloutError, match="loses the adapter it was given; see what it prints"):
            tokens(engine)
        server.load = load


# In between


def test_a_busy_server_is_asked_again(adapted, server) -> None:
    said: list[str] = []
    with opened(adapted, server, warn=said.append) as engine:
        before = tokens(engine)
        server.refuse["/completions"] = [BUSY] * 5
        server.refuse["/load_lora_adapter"] = [BUSY] * 2
        engine.sync(1)
        assert tokens(engine) == before
    assert len(said) == 2, "once each time that it stops answering"
    assert said[0] == f"the vLLM server at {server.url} does not answer (503 starting); waiting 5 seconds for it"


def test_a_server_that_stays_away_ends_the_run(adapted, model) -> None:
    said: list[str] = []
    with vllm_server.serving(model) as server, opened(adapted, server, patience=0.3, warn=said.append) as engine:
        tokens(engine)
        server.refuse["/completions"] = [BUSY] * 10_000
        begun = time.monotonic()
        with pytest.raises(RolloutError, match=r"no vLLM server has answered at .* for rollout.patience=0.3 seconds"):
            tokens(engine)
        assert time.monotonic() - begun < 5


def test_an_answer_that_takes_too_long(adapted, server) -> None:
    with opened(adapted, server, timeout=4.0) as engine:
        server.hold.clear()
        with pytest.raises(RolloutError, match=r"has not answered within rollout.timeout=4 seconds; raise it"):
            tokens(engine)
        server.hold.set()


def test_an_answer_that_is_none(adapted, server) -> None:
    with opened(adapted, server) as engine:
        for reply in (
            {"choices": [{"finish_reason": "stop"}]},
            {},
            [],
            {"choices": [{"finish_reason": "stop", "token_ids": [3], "logprobs": {"token_logprobs": [-1.0, -2.0]}}]},
        ):
            server.refuse["/completions"] = [(200, reply)] * 4
            with pytest.raises(RolloutError, match=r"the server's answer is not what vLLM 0.10.2 or later gives"):
                tokens(engine)
        logits = {"finish_reason": "stop", "token_ids": [3], "logprobs": {"token_logprobs": [2.0]}}
        server.refuse["/completions"] = [(200, {"choices": [logits]})] * 4
        with pytest.raises(RolloutError, match="log-probs above 0"):
            tokens(engine)


def test_leaving_gives_requests_up(adapted, server) -> None:
    """At once, though the server still works on them."""
    with opened(adapted, server) as engine:
        tokens(engine)
        server.asked.clear()
        server.hold.clear()
        generated = engine.generate(make.prompts(adapted), 2, sampling(), 0, seed=1)

        def wait() -> None:
            with suppress(CancelledError):
                next(generated)

        waiting = threading.Thread(target=wait)
        waiting.start()
        while len(server.bodies("/completions")) < 4:
            time.sleep(0.01)
        begun = time.monotonic()
    waiting.join(10)
    server.hold.set()
    assert not waiting.is_alive()
    assert time.monotonic() - begun < 5
