"""vLLM itself, with the embedded model: `make test-vllm` installs it beside the project, and runs these."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import httpx2
import make
import pytest
import torch
from engines import ROUNDING, TEMPERATURE, sampling
from helpers import main, read_json, read_lines
from vllm_cases import OPTIONS, log_pi, sampled_tokens

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.errors import RolloutError
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.vllm import VLLMEngine, VLLMRollout
from dppo_cli.rollout.vllm_http import CONNECTING
from dppo_cli.rollout.vllm_probe import start_command
from dppo_cli.types import Prompt, Status

pytestmark = pytest.mark.vllm
PYTHON = os.environ.get("DPPO_VLLM_PYTHON", "")
LOG = Path(tempfile.gettempdir()) / "dppo-test-vllm.log"
TEXTS = ("12+34=", "7+8=", "99+9=", "45-46=")


@pytest.fixture(scope="module", autouse=True)
def _there_is_one() -> None:
    if not PYTHON:
        pytest.skip("DPPO_VLLM_PYTHON names no Python that has vLLM; `make test-vllm` installs one")


@pytest.fixture(scope="module")
def policy(train_config) -> Policy:
    return embedded(train_config("adapter.r=16", "adapter.alpha=32"))


def embedded(config: TrainConfig) -> Policy:
    """The embedded model: vLLM has no attention for heads as small as those of the tiny ones."""
    return make.policy(replace(config, model=replace(config.model, path="embedded:arithmetic_1m")), adapter_scale=0.02)


@contextmanager
def serving(policy: Policy, port: int, *more: str, less: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
    """A server started as the user is told to, with `more` words at the end and without those of `less`."""
    switch, _, _, *words = start_command(policy, 20, 1, "http://localhost:8000").split()
    words = [word for word in words if word not in less]
    module = ["-m", "vllm.entrypoints.openai.api_server", "--model"]  # `vllm serve` needs the package of a GPU
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    if switch not in less:
        environment |= [switch.split("=")]
    command = [PYTHON, *module, *words, "--port", str(port), "--enforce-eager", *more]
    with LOG.open("a") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def opened(policy: Policy, port: int, **options: object) -> Iterator[VLLMEngine]:
    said: list[str] = []
    with VLLMRollout(**{"url": f"http://127.0.0.1:{port}", **OPTIONS, "patience": 180.0, **options}).load(
        policy, said.append
    ) as engine:
        engine.sync(0)
        yield engine


@pytest.fixture(scope="module")
def prompts(policy: Policy) -> list[Prompt]:
    return make.prompts(policy, TEXTS)


@pytest.fixture(scope="module")
def server(policy: Policy, port: int) -> Iterator[subprocess.Popen[bytes]]:
    with serving(policy, port) as process:
        yield process


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("temperature", [TEMPERATURE, 1.0])
def test_log_probs_are_those_of_the_trainer(policy, port, prompts, temperature) -> None:
    with opened(policy, port) as engine:
        completions = in_order(engine.generate(prompts, 16, sampling(3, temperature), 5, seed=1))
        again = in_order(engine.generate(prompts, 16, sampling(3, temperature), 0, seed=1))
    assert make.tokens(again) == make.tokens(completions), "equal seeds"
    token_N, mu = sampled_tokens(completions), make.reported(completions)
    log_pi_NV = make.trained_log_probs(policy, prompts, completions, temperature)
    torch.testing.assert_close(mu.logp_N, log_pi_NV.gather(-1, token_N[:, None])[:, 0], **ROUNDING)
    torch.testing.assert_close(mu.topk_logp_NK, log_pi_NV.topk(5).values, **ROUNDING)
    torch.testing.assert_close(log_pi_NV.gather(-1, mu.topk_ids_NK), mu.topk_logp_NK, **ROUNDING)
    assert {one.status for one in make.flat(completions)} == {Status.FINISHED, Status.CUT}
    for one in make.flat(completions):
        ended = int(one.token_ids_T[-1]) in policy.eos_ids
        assert one.status is (Status.FINISHED if ended else Status.CUT)


@pytest.mark.usefixtures("server")
def test_stop_strings(policy, port, prompts) -> None:
    with opened(policy, port) as engine:
        how = replace(sampling(8, 1.0), stop=["3", "4"])
        completions = make.flat(in_order(engine.generate(prompts, 16, how, 0, seed=1)))
    stopped = [one for one in completions if {"3", "4"} & set(policy.tokenizer.decode(one.token_ids_T))]
    assert len(stopped) > 5
    for one in stopped:
        assert one.status is Status.FINISHED and not {"3", "4"} & set(one.text)
        assert not {"3", "4"} & set(policy.tokenizer.decode(one.token_ids_T[:-1]))


@pytest.mark.usefixtures("server")
def test_versions_live_beside_each_other(policy, port, prompts) -> None:
    with opened(policy, port, ahead=1) as engine:
        engine.sync(1)
        late = engine.generate(prompts, 8, sampling(6), 0, seed=1)
        weights = [parameter.detach().clone() for parameter in policy.parameters]
        make.move_adapter(policy, 0.05, seed=3)
        engine.sync(2)
        now = in_order(engine.generate(prompts, 8, sampling(6), 0, seed=1))
        torch.testing.assert_close(make.reported(now).logp_N, log_pi(policy, prompts, now), **ROUNDING)
        for parameter, weight in zip(policy.parameters, weights, strict=True):
            parameter.data.copy_(weight)
        old = in_order(late)
        torch.testing.assert_close(make.reported(old).logp_N, log_pi(policy, prompts, old), **ROUNDING)
    assert make.tokens(old) != make.tokens(now)


@pytest.mark.usefixtures("server")
def test_a_run(work: Path, port: int) -> None:
    words = ["rollout=vllm", f"rollout.url=http://127.0.0.1:{port}", "data.eval_problems=200", "seed=2", "adapter.r=16"]
    words += ["rollout.patience=5"]
    for ahead in (0, 1):
        run = work / f"run{ahead}"
        assert main(["train", *words, "steps=12", f"rollout.ahead={ahead}", f"run_dir={run}"]) == 0
        summary = read_json(run / "summary.json")
        assert summary["eval_after"] > summary["eval_before"] + 0.15
        rows = read_lines(run / "metrics.jsonl")
        assert [row["staleness"] for row in rows] == [0] + [ahead] * 11
        assert max(row["mismatch_mean"] for row in rows if not row["staleness"]) < 1e-5


@pytest.mark.usefixtures("server")
def test_another_model_is_refused(train_config, policy, port, prompts) -> None:
    other = embedded(train_config())
    weight = other.model.get_output_embeddings().weight
    weight.data = weight.data.roll(1, 0)
    with opened(other, port) as engine, pytest.raises(RolloutError, match="serves another model than"):
        list(engine.generate(prompts, 1, sampling(4), 0, seed=1))


@pytest.mark.usefixtures("server")
def test_a_busy_server_says_what_it_serves(policy, port) -> None:
    """That is how one that hangs is known from one that is busy."""
    with opened(policy, port):
        url, seconds = f"http://127.0.0.1:{port}/v1", []
        name = httpx2.get(f"{url}/models").json()["data"][0]["id"]
        body = {"model": name, "prompt": [5, 6], "n": 64, "max_tokens": 200, "ignore_eos": True}
        with ThreadPoolExecutor() as pool:
            busy = [pool.submit(httpx2.post, f"{url}/completions", json=body, timeout=300) for _ in range(4)]
            while not all(request.done() for request in busy):
                begun = time.perf_counter()
                assert httpx2.get(f"{url}/models", timeout=CONNECTING).status_code == 200
                seconds.append(time.perf_counter() - begun)
                time.sleep(0.2)
        assert {request.result().status_code for request in busy} == {200}
        assert len(seconds) >= 3


def test_a_server_that_dies_and_is_started_again(policy, port, prompts, server) -> None:
    """The last test of this server."""
    with opened(policy, port) as engine:
        before = make.tokens(in_order(engine.generate(prompts, 4, sampling(6), 0, seed=1)))
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
        with serving(policy, port):
            assert make.tokens(in_order(engine.generate(prompts, 4, sampling(6), 0, seed=1))) == before


def test_log_probs_without_the_temperature_are_refused(policy, prompts) -> None:
    port = free_port()
    with (
        serving(policy, port, less=("--logprobs-mode", "processed_logprobs")),
        opened(policy, port) as engine,
        pytest.raises(RolloutError, match="reports log-probs without the temperature"),
    ):
        list(engine.generate(prompts, 1, sampling(4), 0, seed=1))


def test_what_a_server_lacks(policy, train_config, prompts) -> None:
    """Lists as long as asked for, ranks as high as the adapter's, context: said with what to start it with."""
    port = free_port()
    high = embedded(train_config("adapter.r=32"))
    with serving(policy, port, "--max-logprobs", "3", "--max-model-len", "64"):
        with opened(policy, port) as engine:
            with pytest.raises(RolloutError, match=r"refuses: 400 .*logprobs.*; start it with: .*--max-logprobs 20"):
                list(engine.generate(prompts, 1, sampling(4), 5, seed=1))
            with pytest.raises(RolloutError, match=r"longer than the 64 that the vLLM server .* takes"):
                list(engine.generate(prompts, 1, sampling(64), 0, seed=1))
        with pytest.raises(RolloutError, match=r"rank.*--max-lora-rank 32"), opened(high, port):
            pass


def test_a_server_that_takes_no_adapters(policy) -> None:
    port = free_port()
    with (
        serving(policy, port, less=("VLLM_ALLOW_RUNTIME_LORA_UPDATING=True",)),
        pytest.raises(RolloutError, match="takes no adapters while it runs"),
        opened(policy, port),
    ):
        pass
