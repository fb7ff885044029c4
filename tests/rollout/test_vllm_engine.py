"""The engine of vLLM servers: reports are those of the adapted, adapters follow it, requests leave nothing open."""

from dataclasses import replace
from pathlib import Path

import make
import pytest
import torch
import vllm_server
from engines import ROUNDING, TEMPERATURE, sampling
from vllm_cases import log_pi, opened, sampled_tokens

from dppo_cli.errors import RolloutError
from dppo_cli.rollout.engine import in_order
from dppo_cli.types import Status


@pytest.mark.parametrize("temperature", [TEMPERATURE, 1.0])
def test_log_probs_are_those_of_the_trainer(adapted, server, temperature) -> None:
    """Of the sampled tokens, of the K likeliest, with the adapter, tempered."""
    prompts, k = make.prompts(adapted), 3
    with opened(adapted, server) as engine:
        completions = in_order(engine.generate(prompts, 2, sampling(temperature=temperature), k, seed=1))
    log_pi_NV = make.trained_log_probs(adapted, prompts, completions, temperature)
    mu = make.reported(completions)
    token_N = sampled_tokens(completions)
    torch.testing.assert_close(mu.logp_N, log_pi_NV.gather(-1, token_N[:, None])[:, 0], **ROUNDING)
    expected = log_pi_NV.topk(k)
    torch.testing.assert_close(mu.topk_logp_NK, expected.values, **ROUNDING)
    assert torch.equal(mu.topk_ids_NK, expected.indices)
    assert (token_N[:, None] == mu.topk_ids_NK).any(-1).float().mean() < 0.9, "tokens outside of the K occur"


def test_a_binary_report_has_no_list(adapted, server) -> None:
    with opened(adapted, server) as engine:
        completions = in_order(engine.generate(make.prompts(adapted), 2, sampling(), 0, seed=1))
    assert make.reported(completions).topk_ids_NK is None


def test_a_list_is_never_longer_than_the_vocabulary(adapted, server) -> None:
    vocabulary = adapted.head.weight_VH.shape[0]
    server.longest_list = 1000
    with opened(adapted, server, max_logprobs=1000) as engine:
        completions = in_order(engine.generate(make.prompts(adapted), 1, sampling(), 1000, seed=1))
    assert make.reported(completions).topk_ids_NK.shape[1] == vocabulary
    assert {body["logprobs"] for body in server.bodies("/completions")[2:]} == {vocabulary}


def test_completions_are_whole(adapted, server) -> None:
    """Every prompt has its own, with text, status and version; all of their tokens are sampled."""
    prompts = make.prompts(adapted)
    adapted = replace(adapted, eos_ids=(1, 5, 9, 20, 33))
    with opened(adapted, server) as engine:
        engine.sync(7)
        completions = in_order(engine.generate(prompts, 12, sampling(max_new_tokens=6), 0, seed=1))
    assert [len(row) for row in completions] == [12] * len(prompts)
    for one in make.flat(completions):
        ids = one.token_ids_T.tolist()
        ended = ids[-1] in adapted.eos_ids
        assert one.status is (Status.FINISHED if ended else Status.CUT)
        assert ended or len(ids) == 6
        assert one.text == adapted.decode(ids)
        assert one.versions == (7,) and one.sampled_T.all()
    assert {one.status for one in make.flat(completions)} == {Status.FINISHED, Status.CUT}


def test_seeds(adapted, server) -> None:
    """Equal calls give equal tokens, a prompt's follow from its number in the whole, other seeds give others."""
    prompts, how = make.prompts(adapted), sampling()

    def tokens(seed: int, some: slice = slice(None), numbers: list[int] | None = None) -> list[list[int]]:
        return make.tokens(in_order(engine.generate(prompts[some], 2, how, 0, seed, numbers)))

    with opened(adapted, server) as engine:
        whole = tokens(3)
        assert tokens(3) == whole
        assert tokens(3, slice(2, None), [2, 3]) == whole[4:]
        assert tokens(4) != whole
        assert len(set(map(tuple, whole))) == len(whole), "samples of a prompt differ"
    with opened(adapted, server, seeded=False) as engine:
        tokens(3)
        assert {body["seed"] for body in server.bodies("/completions")[-4:]} == {None}


def test_a_request_says_all_that_shapes_the_distribution(adapted, server) -> None:
    """The server's defaults are those of the model's generation config: nucleus sampling and penalties, often."""
    how = replace(sampling(max_new_tokens=5), stop=["7"])
    with opened(adapted, server) as engine:
        list(engine.generate(make.prompts(adapted)[:1], 2, how, 4, seed=1))
        name = f"{engine.name}-1"
    body = server.bodies("/completions")[-1]
    seed = body.pop("seed")
    assert 0 <= seed < 2**62
    assert body == {
        "model": name,
        "prompt": list(make.prompts(adapted)[0].token_ids),
        "n": 2,
        "max_tokens": 5,
        "temperature": TEMPERATURE,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "logprobs": 4,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "ignore_eos": True,
        "stop_token_ids": list(adapted.eos_ids),
        "stop": ["7"],
        "skip_special_tokens": False,
    }


def test_stop_strings_end_a_response(adapted, server) -> None:
    """The text ends before them, the tokens with the one that completes them."""
    letters = "aeiou"
    with opened(adapted, server) as engine:
        how = replace(sampling(), stop=list(letters))
        completions = make.flat(in_order(engine.generate(make.prompts(adapted), 4, how, 0, seed=1)))
    stopped = [one for one in completions if any(c in adapted.tokenizer.decode(one.token_ids_T) for c in letters)]
    assert stopped and all(one.status is Status.FINISHED for one in stopped)
    for one in stopped:
        assert not set(letters) & set(one.text)
        assert set(letters) & set(adapted.tokenizer.decode(one.token_ids_T[-1:]))
        assert not set(letters) & set(adapted.tokenizer.decode(one.token_ids_T[:-1]))


def test_the_adapter_follows_the_policy(adapted, server) -> None:
    """A sync hands over what is trained, under a new name and in a folder of its own; older ones go."""
    prompts = make.prompts(adapted)

    def mismatch() -> float:
        completions = in_order(engine.generate(prompts, 2, sampling(), 0, seed=1))
        return float((log_pi(adapted, prompts, completions) - make.reported(completions).logp_N).abs().max())

    with opened(adapted, server) as engine:
        folder = engine.folder
        assert mismatch() < 1e-5
        make.move_adapter(adapted, 0.5, seed=9)
        assert mismatch() > 0.1
        engine.sync(1)
        assert mismatch() < 1e-5
        for version in (2, 3):
            engine.sync(version)
        assert server.adapters() == [f"{engine.name}-4"]
        assert [path.name for path in folder.iterdir()] == ["4"]
        assert folder.stat().st_mode & 0o077 == 0, "nobody else reads a temporary folder"
    assert server.adapters() == []
    assert not folder.exists()


def test_it_goes_on_while_the_policy_moves(adapted, server) -> None:
    """Sampling begins when it is called, and keeps to its version, adapter and all."""
    prompts = make.prompts(adapted)
    with opened(adapted, server, ahead=1) as engine:
        before = in_order(engine.generate(prompts, 2, sampling(), 0, seed=1))
        server.hold.clear()
        generated = engine.generate(prompts, 2, sampling(), 0, seed=1)
        make.move_adapter(adapted, 0.5, seed=9)
        engine.sync(1)
        server.hold.set()
        late = in_order(generated)
        after = in_order(engine.generate(prompts, 2, sampling(), 0, seed=1))
        assert server.adapters() == [f"{engine.name}-{n}" for n in (1, 2)]
        engine.sync(2)
        assert server.adapters() == [f"{engine.name}-{n}" for n in (2, 3)]
    assert server.adapters() == []
    assert make.tokens(late) == make.tokens(before) != make.tokens(after)
    torch.testing.assert_close(make.reported(late).logp_N, make.reported(before).logp_N)
    assert [one.versions for one in make.flat(late)] == [(0,)] * 8
    assert [one.versions for one in make.flat(after)] == [(1,)] * 8


def test_a_folder_for_servers_elsewhere(adapted, server, tmp_path) -> None:
    with opened(adapted, server, adapters=str(tmp_path / "shared")) as engine:
        path = Path(server.bodies("/load_lora_adapter")[0]["lora_path"])
        assert path == tmp_path / "shared" / engine.name / "1"
        assert (path / "adapter_model.safetensors").is_file()
        assert path.parent.stat().st_mode & 0o055 == 0o055
    assert list((tmp_path / "shared").iterdir()) == []


def test_a_folder_that_cannot_be_written(adapted, server, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(RolloutError, match=r"rollout.adapters=.*/file cannot be written: Not a directory"),
        opened(adapted, server, adapters=str(tmp_path / "file")),
    ):
        pass


def test_a_model_without_an_adapter(train_config, model, server) -> None:
    plain = make.plain_policy(model, train_config())
    prompts = make.prompts(plain)
    with opened(plain, server) as engine:
        completions = in_order(engine.generate(prompts, 2, sampling(), 0, seed=1))
    assert {body["model"] for body in server.bodies("/completions")} == {"base"}
    assert server.bodies("/load_lora_adapter") == []
    mu_N = make.reported(completions).logp_N
    torch.testing.assert_close(mu_N, log_pi(plain, prompts, completions), **ROUNDING)


def test_responses_that_the_server_gave_up_are_missing(adapted, server) -> None:
    with opened(adapted, server) as engine:
        list(engine.generate(make.prompts(adapted)[:1], 1, sampling(), 0, seed=1))
        server.abort = 1
        completions = in_order(engine.generate(make.prompts(adapted), 3, sampling(), 0, seed=1))
    assert [len(row) for row in completions] == [2] * 4


def test_a_prompt_too_long_for_the_server(adapted, server) -> None:
    server.longest = 21
    with (
        opened(adapted, server) as engine,
        pytest.raises(
            RolloutError, match=r"problem 1 has \d+ tokens, and with sampling.max_new_tokens=20 .* the 21 that"
        ),
    ):
        list(engine.generate(make.prompts(adapted)[:2], 1, sampling(max_new_tokens=20), 0, seed=1))


def test_what_it_says_of_itself(adapted, server, model) -> None:
    with vllm_server.serving(model) as second, opened(adapted, server, second) as engine:
        assert engine.samples_with == f"vLLM 0.32.0 at {server.url} and 1 more, base with the adapter beside it"


def test_the_policy_trains_on(adapted, server) -> None:
    """Comparing it with the server leaves it as it was."""
    adapted.model.train()
    with opened(adapted, server) as engine:
        list(engine.generate(make.prompts(adapted)[:1], 1, sampling(), 0, seed=1))
        assert adapted.model.training
