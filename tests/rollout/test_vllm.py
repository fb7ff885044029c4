"""The options of rollout=vllm, and what they refuse before anything is loaded."""

import json

import make
import pytest
from vllm_cases import OPTIONS

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.config.conf_tree import config_dir
from dppo_cli.errors import ConfigError
from dppo_cli.rollout.engine import in_each_process, steps_ahead
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.rollout.vllm import VLLMRollout
from dppo_cli.rollout.vllm_http import addresses, words
from dppo_cli.rollout.vllm_probe import start_command
from dppo_cli.rollout.vllm_reply import read_choices

URL = "http://localhost:8000"


def option(**changes: object) -> VLLMRollout:
    return VLLMRollout(**{"url": URL, **OPTIONS, **changes})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("url", "localhost:8000", "rollout.url=localhost:8000 is no address; write http://host:port"),
        ("url", "http://", "is no address"),
        ("url", "http://localhost:abc", "is no address; write http://host:port"),
        ("url", "http://localhost:99999", "is no address; write http://host:port"),
        ("url", "http://[::1", "is no address; write http://host:port"),
        ("url", 8000, "is no address; write http://host:port, or a list of them"),
        ("url", [], "is no address"),
        ("url", [URL, 3], "rollout.url=3 is no address"),
        ("url", [URL, f"{URL}/v1"], "rollout.url names a server twice"),
        ("url", "http://me:secret@host", "rollout.url holds a password; leave it out"),
        ("ahead", 9, "rollout.ahead=9 breaks the rule"),
        ("ahead", -1, "rollout.ahead=-1 breaks the rule"),
        ("concurrent_prompts", 0, "rollout.concurrent_prompts=0 breaks the rule"),
        ("max_logprobs", 0, "rollout.max_logprobs=0 breaks the rule"),
        ("timeout", 0.0, "rollout.timeout=0.0 breaks the rule"),
        ("patience", -1.0, "rollout.patience=-1.0 breaks the rule"),
    ],
)
def test_values_that_cannot_work(key, value, says) -> None:
    with pytest.raises(ConfigError) as caught:
        option(**{key: value})
    assert says in str(caught.value)
    assert "secret" not in str(caught.value)


def test_reports_that_it_cannot_give(train_config) -> None:
    adapter = train_config().adapter
    option().check(20, adapter)
    option().check(0, None)
    with pytest.raises(ConfigError, match=r"approx.k=21 is more than rollout.max_logprobs=20"):
        option().check(21, adapter)
    with pytest.raises(ConfigError, match=r"approx=full needs .* which a server does not send"):
        option().check(WHOLE_VOCABULARY, adapter)


def test_adapters_that_it_cannot_run(train_config) -> None:
    with pytest.raises(ConfigError, match="vLLM cannot sample with DoRA"):
        train_config("adapter=dora", "rollout=vllm")
    assert train_config("adapter=rslora", "rollout=vllm", "approx=topk").rollout.url == URL


def test_sampling_ahead_replaces_no_groups(train_config) -> None:
    with pytest.raises(ConfigError, match=r"replacement_rounds=2 breaks the rule .* = 0 with rollout.ahead"):
        train_config("rollout=vllm", "rollout.ahead=1", "replacement_rounds=2")
    train_config("rollout=vllm", "replacement_rounds=2")
    assert steps_ahead(option(ahead=2)) == 2
    assert steps_ahead(LocalRollout("auto", None, 512, 1024)) == 0


@pytest.mark.parametrize("file", ["docs/vllm.md", "conf/rollout/vllm.yaml"])
def test_what_starts_a_server_is_what_the_files_say(file, train_config) -> None:
    """But for the model, its precision, and what only a CPU needs."""
    text = (config_dir().parent / file).read_text(encoding="utf-8").replace("\\\n", " ").replace("#", " ")
    [line] = [line for line in text.splitlines() if " serve " in line and "VLLM_ALLOW" in line]
    policy = make.policy(train_config("adapter.r=32"))
    wanted = start_command(policy, 20, 0, URL).replace("--no-enable-chunked-prefill ", "").split()
    own = {"--dtype", "float32", policy.path, "vllm"}
    assert {word for word in wanted if word not in own} <= set(line.split())


def test_addresses() -> None:
    assert addresses(f"{URL}/v1/") == [URL]
    assert addresses([f"{URL}/", "http://b"]) == [URL, "http://b"]


def test_one_engine_for_all_processes() -> None:
    assert not in_each_process(option())
    assert in_each_process(LocalRollout("auto", None, 512, 1024))


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ({"error": {"message": "no\nmodel", "type": "x"}}, "no model"),
        ({"error": "Unauthorized"}, "Unauthorized"),
        ({"detail": "Not Found"}, "Not Found"),
        ({"object": "error", "message": "too long"}, "too long"),
        (["odd"], '["odd"]'),
        ("key and more", "*** and more"),
    ],
)
def test_what_a_server_says_is_wrong(reply, line) -> None:
    assert words(json.dumps(reply).encode(), "key") == line


def test_lists_of_the_likeliest_tokens() -> None:
    """Largest first, without the sampled one where it is none of them; minus infinity is none that JSON has."""
    lists = [
        {"token_id:7": -3.0, "token_id:1": -0.5, "token_id:2": -1.5},
        {"token_id:4": -2.0, "token_id:5": -0.5},
        {"token_id:4": 0.0, "token_id:5": -9999.0},
    ]
    choice = {"finish_reason": "stop", "token_ids": [7, 4, 4]}
    choice["logprobs"] = {"token_logprobs": [-3.0, -2.0, 0.0], "top_logprobs": lists}
    given_up = {"finish_reason": "abort"}
    [(token_T, mu, ended)] = read_choices(json.dumps({"choices": [given_up, choice]}).encode(), 2)
    assert token_T.tolist() == [7, 4, 4] and ended
    assert mu.logp_N.tolist() == [-3.0, -2.0, 0.0]
    assert mu.topk_ids_NK.tolist() == [[1, 2], [5, 4], [4, 5]]
    assert mu.topk_logp_NK.tolist() == [[-0.5, -1.5], [-0.5, -2.0], [0.0, float("-inf")]]
