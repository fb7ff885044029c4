"""The in-process engine hands out the samples of a prompt when the last of them has ended, not when all have."""

from collections.abc import Callable
from dataclasses import replace

import make
import pytest
import torch
from engines import opened, sampling

from dppo_cli.kernels.packed import PackedLinear
from dppo_cli.policy import loading
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout import local
from dppo_cli.rollout.decoder import Decoder
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalRollout

merging = pytest.mark.parametrize("merge", [True, False], ids=["merged", "beside"])


@pytest.fixture
def ending(train_config: Callable[..., object]) -> Policy:
    """Its responses end after a few tokens, some sooner than others."""
    return replace(make.policy(train_config(), adapter_scale=0.1), eos_ids=(1, *range(5, 14)))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An item for every token that was sampled of the sequences in the batch."""
    real, done = Decoder.step, []
    monkeypatch.setattr(Decoder, "step", lambda *of: (done.append(1), real(*of))[1])
    return done


def longest(completions: list) -> int:
    return max(len(c.token_ids_T) for c in completions)


@merging
def test_a_prompt_comes_in_the_step_after_its_last_token(ending, steps, merge):
    prompts, found = make.prompts(ending), []
    with opened(ending, merge=merge) as engine:
        for number, completions in engine.generate(prompts, 2, sampling(30), 0, seed=2):
            found.append((number, completions, len(steps)))
    assert sorted(number for number, _, _ in found) == [0, 1, 2, 3]
    assert [number for number, _, _ in found] != [0, 1, 2, 3], "they end in another order"
    *early, last = found
    for _, completions, at in early:
        assert at == longest(completions) < last[2] + 1
    assert longest(last[1]) == len(steps) + 1, "the last one needs no further step"


def test_where_the_host_looks_now_and_then_it_comes_at_the_next_look(ending, steps, monkeypatch):
    monkeypatch.setattr(local, "CUDA", "cpu")
    monkeypatch.setattr(local, "refuses", lambda *_: "a family of its own")
    prompts, at = make.prompts(ending), {}
    with opened(ending) as engine:
        for number, completions in engine.generate(prompts, 2, sampling(30), 0, seed=2):
            at[number] = (len(steps), longest(completions))
    assert set(at) == {0, 1, 2, 3}
    assert {steps for steps, _ in at.values()} <= {7, 8, 15, 16, 23, 24, 29}, "8 steps from look to look"
    assert min(at.values())[0] < max(at.values())[0]


@merging
def test_what_comes_early_is_what_comes_late(ending, merge):
    """Nothing that is sampled later changes it: neither tokens, nor reports."""
    prompts = make.prompts(ending)
    with opened(ending, merge=merge) as engine:
        at_once = {
            number: [(c.token_ids_T.tolist(), c.mu.logp_N.tolist(), c.mu.topk_ids_NK.tolist(), c.text) for c in group]
            for number, group in engine.generate(prompts, 3, sampling(30), 3, seed=2)
        }
        late = in_order(engine.generate(prompts, 3, sampling(30), 3, seed=2))
    for number, group in enumerate(late):
        found = [(c.token_ids_T.tolist(), c.mu.logp_N.tolist(), c.mu.topk_ids_NK.tolist(), c.text) for c in group]
        assert found == at_once[number]


def test_in_order():
    assert in_order(iter([(2, ["c"]), (0, ["a", "d"]), (1, [])])) == [["a", "d"], [], ["c"]]


# Whose mode it is


@merging
def test_who_takes_the_groups_runs_in_a_mode_of_its_own(train_config, monkeypatch, merge):
    monkeypatch.setattr(loading, "emulates_bfloat16", lambda *_: False)  # no warning, whatever this processor has
    policy = make.policy(train_config("hardware.dtype=bfloat16"), adapter_scale=0.1)
    policy = replace(policy, eos_ids=(1, *range(5, 14)))
    real, inside = Decoder.step, set()

    def step(*of):
        inside.add((torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")))
        return real(*of)

    monkeypatch.setattr(Decoder, "step", step)
    # Merging in bfloat16 warns.
    with LocalRollout("merged" if merge else "adapter", None, 512, 8).load(policy, lambda _: None) as engine:
        engine.sync(0)
        for _, completions in engine.generate(make.prompts(policy), 2, sampling(), 0, seed=2):
            assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
            assert not any(c.mu.logp_N.is_inference() or c.token_ids_T.is_inference() for c in completions)
            with torch.autocast("cpu", torch.bfloat16):  # which does not reach into the sampling, nor outlives it
                assert torch.ones(1, requires_grad=True).mul(2).requires_grad
    assert inside == {(True, not merge)}


@merging
@pytest.mark.parametrize("end", ["close", "forget", "break"])
def test_sampling_that_is_given_up_leaves_everything_as_it_was(ending, merge, end):
    prompts = make.prompts(ending)
    ending.model.train()
    with opened(ending, merge=merge) as engine:
        whole = make.tokens(in_order(engine.generate(prompts, 2, sampling(30), 0, seed=2)))
        if end == "break":
            for _ in engine.generate(prompts, 2, sampling(30), 0, seed=2):
                break
        else:
            groups = engine.generate(prompts, 2, sampling(30), 0, seed=2)
            next(groups)
            assert ending.model.training is merge, "the policy itself samples without dropout"
            if end == "close":
                groups.close()
            del groups
        assert ending.model.training and all(m.training for m in ending.model.modules())
        assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
        if merge:
            filled = [target for _, target in engine.copy.fills]
            assert not any(t.packed is not None if isinstance(t, PackedLinear) else t.weight.numel() for t in filled)
        assert make.tokens(in_order(engine.generate(prompts, 2, sampling(30), 0, seed=2))) == whole


def test_sampling_that_fails_leaves_the_policy_as_it_was(ending, monkeypatch):
    monkeypatch.setattr(Decoder, "step", lambda *_: 1 / 0)
    ending.model.train()
    with opened(ending, merge=False) as engine, pytest.raises(ZeroDivisionError):
        in_order(engine.generate(make.prompts(ending), 2, sampling(30), 0, seed=2))
    assert ending.model.training and not torch.is_inference_mode_enabled()
