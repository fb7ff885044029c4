"""vLLM servers that are absent, restart, die, refuse, or serve something else."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import suppress
from pathlib import Path

import make
import pytest
import torch
import vllm_server
from engines import sampling
from test_vllm_engine import OPTIONS, opened
from vllm_server import VLLM, error

from dppo_cli.errors import RolloutError
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout import vllm_http, vllm_servers
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.vllm import VLLMEngine, VLLMRollout

NOBODY = "http://127.0.0.1:9"
"""Of the discard service, which no machine runs any more."""
BUSY = (503, error("starting"))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vllm_http, vllm_servers):
        monkeypatch.setattr(module, "PAUSE", 0.02)


@pytest.fixture
def server(model: Path) -> Iterator[VLLM]:
    with vllm_server.serving(model) as found:
        yield found


@pytest.fixture
def policy(train_config) -> Policy:
    return make.policy(train_config(), adapter_scale=0.3)


def tokens(engine: VLLMEngine) -> list[list[int]]:
    prompts = make.prompts(engine.policy)
    return make.tokens(in_order(engine.generate(prompts, 2, sampling(), 0, seed=1)))


# At the start


def test_nobody_answers(policy, model, capsys) -> None:
    """What to start is said at once, and again when it was not started in time."""
    with pytest.raises(RolloutError) as caught, opened(policy, url=NOBODY, patience=0.1):
        pass
    said = capsys.readouterr().err.splitlines()
    start = (
        f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve {model} --dtype float32 --logprobs-mode processed_logprobs "
        "--max-logprobs 20 --no-enable-chunked-prefill --enable-lora --max-lora-rank 8"
    )
    refused = "[Errno 111] Connection refused"
    assert said[-1:] == [f"dppo: no vLLM server answers at {NOBODY} ({refused}); waiting 0.1 seconds for one: {start}"]
    assert str(caught.value) == (
        f"no vLLM server has answered at {NOBODY} for rollout.patience=0.1 seconds ({refused}); start one: {start}; or "
        "sample in this process: rollout=local"
    )


def test_a_server_that_starts_late_is_waited_for(policy, server, capsys) -> None:
    capsys.readouterr()
    server.refuse["/v1/models"] = [BUSY] * 3
    with opened(policy, server) as engine:
        assert len(tokens(engine)) == 8
    [said] = capsys.readouterr().err.splitlines()
    assert "503 starting" in said


def test_something_else_answers(policy, server) -> None:
    server.refuse["/v1/models"] = [(200, {"hello": "world"})]
    with pytest.raises(RolloutError, match=rf"what answers at rollout.url={server.url} is no vLLM server: .*hello"):
        VLLMRollout(server.url, **OPTIONS).load(policy, make.fail)


def test_another_model(policy, server) -> None:
    change(server, 5.0)
    match = r"serves another model than .*/llama3: base, with log-probs that differ by .* nats a token; start it with"
    with pytest.raises(RolloutError, match=match), opened(policy, server) as engine:
        tokens(engine)


def test_log_probs_without_the_temperature(policy, server) -> None:
    server.processed = False
    match = "reports log-probs without the temperature; start it with: .*--logprobs-mode processed_logprobs"
    with pytest.raises(RolloutError, match=match), opened(policy, server) as engine:
        tokens(engine)


def test_weights_a_little_different(policy, server) -> None:
    """As a quantised copy of them has: told once, not refused."""
    said: list[str] = []
    change(server, 0.7)
    with opened(policy, server, warn=said.append) as engine:
        tokens(engine)
        engine.sync(1)
        tokens(engine)
    assert len(said) == 1
    assert said[0].endswith("compare model, precision and quantisation of both")


def change(server: VLLM, scale: float) -> None:
    """What it serves, from its next adapter on."""
    load = server.load

    def changed(body):
        found = load(body)
        head = server.models[body["lora_name"]].get_output_embeddings()
        random = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
        head.weight.data += scale * head.weight.std() * random
        return found

    server.load = changed


def test_keys(policy, server, monkeypatch) -> None:
    """The key goes to the server and nowhere else."""
    server.key = "sesame"
    with pytest.raises(RolloutError, match="wants another key than that which rollout"):
        VLLMRollout(server.url, **OPTIONS).load(policy, make.fail)
    options = {**OPTIONS, "api_key_env": "VLLM_TEST_KEY"}
    with pytest.raises(RolloutError, match="the environment has no such variable; export VLLM_TEST_KEY="):
        VLLMRollout(server.url, **options).load(policy, make.fail)
    monkeypatch.setenv("VLLM_TEST_KEY", "sesame")
    with opened(policy, server, api_key_env="VLLM_TEST_KEY") as engine:
        assert len(tokens(engine)) == 8
        server.refuse["/completions"] = [(400, error("no, sesame is wrong"))]
        with pytest.raises(RolloutError, match=r"refuses: 400 no, \*\*\* is wrong"):
            tokens(engine)


def test_a_server_that_gives_responses_up(policy, server) -> None:
    server.abort = 1
    with pytest.raises(RolloutError, match="gives responses up; see what it prints"), opened(policy, server) as engine:
        tokens(engine)


# Adapters


def test_a_server_that_takes_no_adapters(policy, server) -> None:
    server.updating = False
    match = "takes no adapters while it runs; start it with: VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve"
    with pytest.raises(RolloutError, match=match), opened(policy, server):
        pass


def test_a_server_that_does_not_see_the_folder(policy, server) -> None:
    server.load = lambda body: (404, error(f"No adapter found for {body['lora_path']}"))
    match = r"does not find /.*; on another machine it has to see this folder .* rollout.adapters=FOLDER"
    with pytest.raises(RolloutError, match=match), opened(policy, server):
        pass


def test_an_adapter_of_too_high_a_rank(policy, server) -> None:
    # With a status 500, as servers have that have lost their engine.
    server.load = lambda body: (500, error("LoRA rank 4 is greater than max_lora_rank 2."))
    match = r"refuses: 500 LoRA rank 4 is greater than max_lora_rank 2.; start it with: .*--max-lora-rank 8"
    with pytest.raises(RolloutError, match=match), opened(policy, server):
        pass


def test_lists_longer_than_the_server_gives(policy, server) -> None:
    server.longest_list = 3
    with opened(policy, server) as engine, pytest.raises(RolloutError, match=r"greater than max .*--max-logprobs 20"):
        list(engine.generate(make.prompts(policy), 1, sampling(), 4, seed=1))


def test_a_server_that_was_started_again_gets_the_adapter_again(policy, server) -> None:
    with opened(policy, server) as engine:
        before = tokens(engine)
        server.forget()
        assert tokens(engine) == before
        assert server.adapters() == [f"{engine.name}-1"]
        assert len(server.bodies("/load_lora_adapter")) >= 2


def test_a_server_that_loses_it_again_and_again(policy, server) -> None:
    with opened(policy, server) as engine:
        load = server.load
        server.forget()
        server.load = lambda body: (200, "")
        with pytest.raises(RolloutError, match="loses the adapter it was given; see what it prints"):
            tokens(engine)
        server.load = load


# In between


def test_a_busy_server_is_asked_again(policy, server) -> None:
    said: list[str] = []
    with opened(policy, server, warn=said.append) as engine:
        before = tokens(engine)
        server.refuse["/completions"] = [BUSY] * 5
        server.refuse["/load_lora_adapter"] = [BUSY] * 2
        engine.sync(1)
        assert tokens(engine) == before
    assert len(said) == 2, "once each time that it stops answering"
    assert said[0] == f"the vLLM server at {server.url} does not answer (503 starting); waiting 5 seconds for it"


def test_a_server_that_stays_away_ends_the_run(policy, model) -> None:
    said: list[str] = []
    with vllm_server.serving(model) as server, opened(policy, server, patience=0.3, warn=said.append) as engine:
        tokens(engine)
        server.refuse["/completions"] = [BUSY] * 10_000
        begun = time.monotonic()
        with pytest.raises(RolloutError, match=r"no vLLM server has answered at .* for rollout.patience=0.3 seconds"):
            tokens(engine)
        assert time.monotonic() - begun < 5


def test_an_answer_that_takes_too_long(policy, server) -> None:
    with opened(policy, server, timeout=4.0) as engine:
        server.hold.clear()
        with pytest.raises(RolloutError, match=r"has not answered within rollout.timeout=4 seconds; raise it"):
            tokens(engine)
        server.hold.set()


def test_an_answer_that_is_none(policy, server) -> None:
    with opened(policy, server) as engine:
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


def test_leaving_gives_requests_up(policy, server) -> None:
    """At once, though the server still works on them."""
    with opened(policy, server) as engine:
        tokens(engine)
        server.asked.clear()
        server.hold.clear()
        generated = engine.generate(make.prompts(policy), 2, sampling(), 0, seed=1)

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
