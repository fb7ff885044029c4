"""The in-process engine where it looks only now and then at which sequences have ended, as on CUDA."""

from dataclasses import replace

import make
import pytest
import tiny
import torch
from engines import generate, sampling

from dppo_cli.rollout import local
from dppo_cli.types import Status


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sequences in the batch at each look."""
    seen: list[int] = []
    real = local._still_writing

    def counted(writing_A: torch.Tensor) -> torch.Tensor:
        seen.append(len(writing_A))
        return real(writing_A)

    monkeypatch.setattr(local, "_still_writing", counted)
    monkeypatch.setattr(local, "refuses", lambda *_: "a family of its own")
    return seen


@pytest.mark.parametrize("num_logprobs", [0, 4])
@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
def test_tokens_and_log_probs_are_the_same(train_config, monkeypatch, looks, architecture, num_logprobs):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    policy = replace(policy, eos_ids=(1, *range(5, 9)))
    prompts = make.prompts(policy)[:3]
    every_step = make.flat(generate(policy, prompts, 4, sampling(20), num_logprobs, seed=11))
    assert len(looks) >= 8 and looks[8] < looks[0], "some should end before the second look"
    looks.clear()
    monkeypatch.setattr(local, "CUDA", "cpu")
    now_and_then = make.flat(generate(policy, prompts, 4, sampling(20), num_logprobs, seed=11))
    # After 8 and 16 steps; the last step ends all.
    assert looks[0] == 12 and len(looks) <= 2
    assert [c.token_ids_T.tolist() for c in now_and_then] == [c.token_ids_T.tolist() for c in every_step]
    assert [c.status for c in now_and_then] == [c.status for c in every_step]
    assert {Status.FINISHED} <= {c.status for c in every_step}
    for found, expected in zip(now_and_then, every_step, strict=True):
        torch.testing.assert_close(found.mu.logp_N, expected.mu.logp_N, rtol=1e-5, atol=1e-5)
        if num_logprobs:
            assert torch.equal(found.mu.topk_ids_NK, expected.mu.topk_ids_NK)
            torch.testing.assert_close(found.mu.topk_logp_NK, expected.mu.topk_logp_NK, rtol=1e-5, atol=1e-5)


def test_sampling_ends_at_the_first_look_that_finds_nobody(train_config, monkeypatch, looks):
    policy = make.policy(train_config())
    policy = replace(policy, eos_ids=tuple(range(96)))
    monkeypatch.setattr(local, "CUDA", "cpu")
    completions = make.flat(generate(policy, make.prompts(policy), 2, sampling(20)))
    assert looks == [8] and [len(c.token_ids_T) for c in completions] == [1] * 8


def test_stop_strings_are_looked_for_at_every_step(train_config, monkeypatch, looks):
    policy = make.policy(train_config())
    monkeypatch.setattr(local, "CUDA", "cpu")
    generate(policy, make.prompts(policy), 2, replace(sampling(12), stop=["zzzz"]))
    assert len(looks) == 11
