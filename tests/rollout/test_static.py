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
from dppo_cli.kernels.slots import Room, of_prompts, of_slots
from dppo_cli.policy.policy import Policy, model_head
from dppo_cli.rollout.copies import Sampler
from dppo_cli.rollout.static import OnHost, Prefilled, StaticSequences, prefill

EQUAL = ("3+4=", "a - ", "b + ")


def sampler_of(policy: Policy) -> Sampler:
    head = model_head(policy.model).at(0.7)
    return Sampler(policy.model, head, head.product, nullcontext)


def sequences(policy: Policy, num_logprobs: int = 0, texts=EQUAL, **how) -> tuple[StaticSequences, Prefilled]:
    """Two slots for each prompt, filled; the first prompt is in the last place, and so on."""
    sampler, prompts = sampler_of(policy), make.prompts(policy, texts)
    found = prefill(sampler, prompts, policy.pad_id, policy.device)
    room = Room(prompts=len(prompts), prompt_positions=8, slots=2 * len(prompts), positions=8)
    made = StaticSequences(sampler, room, policy.eos_ids, found, make.fail)
    made.begin(sampler, sampling(8, **how), num_logprobs)
    places = torch.arange(len(prompts), device=policy.device).flip(0)
    made.put_prompts(places, found)
    numbers = torch.arange(room.slots, device=policy.device)
    uniform_NT = torch.rand(room.slots, 8, generator=torch.Generator().manual_seed(0)).to(policy.device)
    made.put(numbers, places.repeat(2), uniform_NT)
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
    for rows in (6, 2):
        made.step(rows, 8)
    made.move(torch.tensor([2], device=meta), torch.tensor([0], device=meta), 8)
    assert made.columns[0].device == meta
    with pytest.raises(NotImplementedError, match="meta"):
        made.ends()


@pytest.mark.parametrize("num_logprobs", [0, 5, WHOLE_VOCABULARY])
@torch.inference_mode()
def test_whatever_a_step_changes_stays_where_it_is(train_config, num_logprobs):
    made, _ = sequences(make.policy(train_config(), adapter_scale=0.1), num_logprobs)
    before = addresses(*tensors(made))
    for _ in range(8):
        made.step(6, 8)
    assert addresses(*tensors(made)) == before
    assert not any(column.is_inference() for column in made.columns)


@torch.inference_mode()
def test_what_has_ended_is_not_written_to(train_config):
    """Its tokens and their number stay while the others go on."""
    policy = replace(make.policy(train_config(), adapter_scale=0.1), eos_ids=(1, *range(3, 60)))
    made, _ = sequences(policy)
    ended: dict[int, list[int]] = {}
    for _ in range(10):
        made.step(6, 8)
        (ends_S,) = made.ends().read()
        for slot, tokens in enumerate(ends_S.tolist()):
            if tokens >= 0:
                kept = made.recorded(slot, tokens)[0].tolist()
                assert ended.setdefault(slot, kept) == kept and len(kept) == tokens
    assert sorted(ended) == list(range(6)) and len({len(kept) for kept in ended.values()}) > 1


@pytest.mark.parametrize("texts", [make.MIXED, EQUAL], ids=["padded", "equal lengths"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.inference_mode()
def test_prompts_begin_in_the_first_column(train_config, tmp_path, family, texts):
    config = train_config()
    policy = make.policy(replace(config, model=replace(config.model, path=str(tiny_models.save(tmp_path, family)))))
    together = prefill(sampler_of(policy), make.prompts(policy, texts), policy.pad_id, policy.device)
    for row, prompt in enumerate(make.prompts(policy, texts)):
        alone = prefill(sampler_of(policy), [prompt], policy.pad_id, policy.device)
        assert together.lengths[row] == len(prompt.token_ids) == alone.lengths[0]
        torch.testing.assert_close(together.hidden_PH[row], alone.hidden_PH[0], rtol=1e-5, atol=1e-5)
        for found, expected in zip(together.states, alone.states, strict=True):
            for ours, plain in zip(found, expected, strict=True):
                cut = ours[row, : len(prompt.token_ids)]
                torch.testing.assert_close(cut, plain[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_prompt_is_stored_once_and_each_of_its_samples_begins_from_it(train_config):
    policy = make.policy(train_config(), adapter_scale=0.1)
    made, found = sequences(policy, texts=("3+4=", "a", "b + "))
    room = made.room
    assert made.num_bytes == 2 * 2 * 2 * 8 * 4 * room.all_positions and room.all_positions == 3 * 8 + 6 * 8
    for row, (place, length) in enumerate(zip((2, 1, 0), found.lengths, strict=True)):
        for states, (keys, values) in zip(made.decoding.states, found.states, strict=True):
            for pool, new in ((states.keys, keys), (states.values, values)):
                assert torch.equal(of_prompts(pool, room)[place, :length], new[row, :length])
                assert not of_slots(pool, room).any()
        assert int(made.prompt_length_P[place]) == length
        for slot in (row, row + 3):
            assert int(made.place_S[slot]) == place
            assert torch.equal(made.hidden_SH[slot], found.hidden_PH[row])


@torch.inference_mode()
def test_slots_that_no_sequence_had_yet_write_to_themselves(train_config):
    policy = make.policy(train_config())
    _, found = sequences(policy)
    made = StaticSequences(sampler_of(policy), Room(3, 8, 6, 8), policy.eos_ids, found, make.fail)
    made.begin(sampler_of(policy), sampling(8), 0)
    made.step(4, 8)
    for states in made.decoding.states:
        own = of_slots(states.keys, made.room)
        assert own[:4, 0].any(-1).all() and not own[:, 1:].any() and not own[4:].any()
        assert not of_prompts(states.keys, made.room).any()
    assert made.hidden_SH.isfinite().all() and (made.ends().read()[0] == 1).all()


@torch.inference_mode()
def test_the_last_tokens_of_each_slot(train_config):
    made, _ = sequences(make.policy(train_config(), adapter_scale=0.1))
    for _ in range(5):
        made.step(6, 8)
    ends_S, written_S, last_ST = made.ends(3).read()
    assert ends_S.tolist() == made.ends().read()[0].tolist() and last_ST.shape == (6, 3)
    for slot, written in enumerate(written_S.tolist()):
        shown = min(3, written)
        assert last_ST[slot, 3 - shown :].tolist() == made.recorded(slot, written)[0][-shown:].tolist()


def test_what_is_read_is_what_it_was_then():
    state = torch.arange(3)
    on_its_way = OnHost([state, state[1:]])
    state.fill_(9)
    assert [t.tolist() for t in on_its_way.read()] == [[0, 1, 2], [1, 2]]
