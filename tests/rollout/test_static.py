"""A static step: it asks the host for nothing, and changes only what was there before."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import make
import pytest
import tiny_models
import torch
from engines import sampling
from recording import addresses
from refills import FAMILIES, tensors

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.policy.policy import Policy, model_head
from dppo_cli.rollout.copies import Sampler
from dppo_cli.rollout.static import OnHost, Prefilled, StaticSequences, prefill

EQUAL = ("3+4=", "a - ", "b + ")


def sampler_of(policy: Policy) -> Sampler:
    head = model_head(policy.model).at(0.7)
    return Sampler(policy.model, head, head.product, nullcontext)


def sequences(policy: Policy, num_logprobs: int = 0, texts=EQUAL, **how) -> tuple[StaticSequences, Prefilled]:
    """A slot for each prompt, filled."""
    sampler, prompts = sampler_of(policy), make.prompts(policy, texts)
    found = prefill(sampler, prompts, policy.pad_id, policy.device)
    of = sampling(8, **how)
    made = StaticSequences(sampler, of, num_logprobs, len(prompts), 40, policy.eos_ids, found, make.fail)
    made.begin(sampler)
    numbers = torch.arange(len(prompts), device=policy.device)
    uniform_NT = torch.rand(len(prompts), 8, generator=torch.Generator().manual_seed(0)).to(policy.device)
    made.put(numbers, found, numbers, torch.tensor(found.lengths, device=policy.device), uniform_NT)
    return made, found


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.0), dict(top_p=0.9, top_k=5, min_p=0.1)])
@pytest.mark.parametrize("num_logprobs", [0, 5, WHOLE_VOCABULARY])
@torch.inference_mode()
def test_a_step_does_not_wait_for_the_device(train_config, num_logprobs, how):
    """Tensors on the meta device have no values, so whatever would wait for one fails."""
    policy = make.policy(train_config())
    meta = torch.device("meta")
    policy = replace(policy, model=copy.deepcopy(policy.model).to(meta), device=meta)
    made, _ = sequences(policy, num_logprobs, **how)
    for rows in (3, 2):
        made.step(rows, 16)
    made.move(torch.tensor([2], device=meta), torch.tensor([0], device=meta), 16)
    assert made.columns[0].device == meta
    with pytest.raises(NotImplementedError, match="meta"):
        made.ends()


@pytest.mark.parametrize("num_logprobs", [0, 5, WHOLE_VOCABULARY])
@torch.inference_mode()
def test_whatever_a_step_changes_stays_where_it_is(train_config, num_logprobs):
    made, _ = sequences(make.policy(train_config(), adapter_scale=0.1), num_logprobs)
    before = addresses(*tensors(made))
    for _ in range(8):
        made.step(3, 16)
    assert addresses(*tensors(made)) == before
    assert not any(column.is_inference() for column in made.columns)


@torch.inference_mode()
def test_what_has_ended_is_not_written_to(train_config):
    """Its tokens, their number and the position after them stay while the others go on."""
    policy = replace(make.policy(train_config(), adapter_scale=0.1), eos_ids=(1, *range(3, 60)))
    made, _ = sequences(policy)
    ended: dict[int, list[int]] = {}
    for _ in range(10):
        made.step(3, 16)
        (ends_S,) = made.ends().read()
        for slot, tokens in enumerate(ends_S.tolist()):
            if tokens >= 0:
                kept = [*made.recorded(slot, tokens)[0].tolist(), int(made.length_S[slot])]
                assert ended.setdefault(slot, kept) == kept and len(kept) == tokens + 1
    assert sorted(ended) == [0, 1, 2] and len({len(kept) for kept in ended.values()}) > 1


@pytest.mark.parametrize("texts", [make.MIXED, EQUAL], ids=["padded", "equal lengths"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_prompts_begin_in_the_first_column(train_config, tmp_path, family, texts):
    config = train_config()
    policy = make.policy(replace(config, model=replace(config.model, path=str(tiny_models.save(tmp_path, family)))))
    together = prefill(sampler_of(policy), make.prompts(policy, texts), policy.pad_id, policy.device)
    for row, prompt in enumerate(make.prompts(policy, texts)):
        alone = prefill(sampler_of(policy), [prompt], policy.pad_id, policy.device)
        for one in (together, together.only(row)):
            at = row if one is together else 0
            assert one.lengths[at] == len(prompt.token_ids) == alone.lengths[0]
            torch.testing.assert_close(one.hidden_PH[at], alone.hidden_PH[0], rtol=1e-5, atol=1e-5)
            for found, expected in zip(one.states, alone.states, strict=True):
                for ours, plain in zip(found, expected, strict=True):
                    cut = ours[at, : len(prompt.token_ids)]
                    torch.testing.assert_close(cut, plain[0], rtol=1e-4, atol=1e-4)


def test_one_prompt_of_many_does_not_hold_the_memory_of_all(train_config):
    policy = make.policy(train_config())
    many = prefill(sampler_of(policy), make.prompts(policy), policy.pad_id, policy.device)
    one = many.only(2)
    assert one.lengths == (1,) and all(t.untyped_storage().nbytes() == t.nbytes for pair in one.states for t in pair)


def test_what_is_read_is_what_it_was_then():
    state = torch.arange(3)
    on_its_way = OnHost([state, state[1:]])
    state.fill_(9)
    assert [t.tolist() for t in on_its_way.read()] == [[0, 1, 2], [1, 2]]
