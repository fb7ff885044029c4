"""Running each prompt once for all its responses, against a forward pass over every whole sequence."""

import itertools
from collections.abc import Sequence
from typing import Any

import make
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from dppo_cli.policy.policy import Policy
from dppo_cli.policy.sharing import CONTEXT_PER_PLACE, SharedPrompts, can_share, split_by_tokens
from dppo_cli.types import Batch, Sample


def responses(policy: Policy, texts: tuple[str, ...], lengths: tuple[int, ...]) -> list[Sample]:
    """Responses of random tokens to each prompt in turn."""
    generator = torch.Generator().manual_seed(0)
    completions = []
    for i, length in enumerate(lengths):
        prompt = make.prompts(policy, texts)[i % len(texts)]
        ids = torch.randint(3, 70, (length,), generator=generator).tolist()
        completions.append(make.completion(ids, prompt_ids=prompt.token_ids))
    return make.samples(completions, [1.0] * len(completions))


def loss(states_NH: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A random direction for each place of each response, the same in whatever batch it stands."""
    direction_RH = torch.randn(64, states_NH.shape[1], generator=torch.Generator().manual_seed(1))
    return (states_NH * direction_RH[batch.place_N] * batch.token_N[:, None].float().cos()).sum()


def gradient(policy: Policy) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in policy.parameters]
    policy.model.zero_grad()
    return found


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
@pytest.mark.parametrize(
    "texts", [make.MIXED, ("3+4=", "a - "), make.ALIKE], ids=["padded", "equal lengths", "begin alike"]
)
@pytest.mark.parametrize("lengths", [(7, 1, 20, 4, 9, 2, 1, 12, 3, 5, 16, 2), (1,) * 8], ids=["mixed", "one token"])
@pytest.mark.parametrize("budget", [1, 30, 1000])
@pytest.mark.parametrize("cut", [1, 5, 12])
def test_states_and_gradients_are_those_of_whole_sequences(train_config, architecture, texts, lengths, budget, cut):
    """Whatever number of prompts runs at a time, and whatever number of responses."""
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    samples = responses(policy, texts, lengths)
    prompts = SharedPrompts(policy, (s.completion.prompt.token_ids for s in samples), budget)
    batches = [Batch.pack(samples[i : i + cut], policy.pad_id, policy.device) for i in range(0, len(samples), cut)]
    shared = []
    for batch in batches:
        states_NH = prompts.predicting_states(batch)
        loss(states_NH, batch).backward()
        shared.append(states_NH.detach())
    prompts.backward()
    shared_gradient = gradient(policy)

    batch = Batch.pack(samples, policy.pad_id, policy.device)
    start_N = batch.prompts.length_P1[batch.prompt_B[batch.row_N], 0]
    whole_NH = policy.hidden_states(batch.whole_ids(policy.pad_id))[batch.row_N, start_N + batch.place_N - 1]
    loss(whole_NH, batch).backward()
    torch.testing.assert_close(torch.cat(shared), whole_NH.detach(), rtol=1e-5, atol=2e-5)
    for found, expected in zip(shared_gradient, gradient(policy), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.abs().max() > 1e-3


def test_a_prompt_runs_twice_however_many_responses_it_has(train_config):
    """Once for its states, once going back; responses of one token need no forward pass of their own."""
    policy = make.policy(train_config())
    calls = []
    hook = policy.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    samples = responses(policy, ("1+2=", "hello"), (3, 1, 3, 1))
    prompts = SharedPrompts(policy, (s.completion.prompt.token_ids for s in samples), 1000)
    for pair in (samples[0::2], samples[1::2]):
        batch = Batch.pack(pair, policy.pad_id, policy.device)
        loss(prompts.predicting_states(batch), batch).backward()
    prompts.backward()
    hook.remove()
    assert [tuple(shape) for shape in calls] == [(2, 5), (2, 2), (2, 5)]
    assert (prompts.places, prompts.tokens) == (10, 9)


def test_what_all_prompts_begin_with_counts_once(train_config):
    policy = make.policy(train_config())
    samples = responses(policy, make.ALIKE, (3, 1, 3, 1))
    prompts = SharedPrompts(policy, (s.completion.prompt.token_ids for s in samples), 1000)
    beginning, longest, tokens = len(make.BEGINNING), len(make.ALIKE[1]), sum(map(len, make.ALIKE))
    assert prompts.places == beginning + 4 * (longest - beginning)
    assert prompts.tokens == tokens - 3 * beginning


def test_without_gradient_nothing_is_kept_for_one(train_config):
    policy = make.policy(train_config(), adapter_scale=0.1)
    samples = responses(policy, make.MIXED, (7, 1, 20, 4))
    batch = Batch.pack(samples, policy.pad_id, policy.device)
    expected = SharedPrompts(policy, batch.prompts.token_ids, 1000).predicting_states(batch)
    with torch.no_grad():
        prompts = SharedPrompts(policy, batch.prompts.token_ids, 1000)
        found = prompts.predicting_states(batch)
    assert torch.equal(found, expected)
    assert expected.requires_grad and not any(state.requires_grad for state in prompts.states)


def test_the_adapters_dropout_is_drawn_once(train_config):
    """Going back, the prompts run with the dropout that they had: the gradient is that of the states that were used."""
    policy = make.policy(train_config("adapter.dropout=0.5"), adapter_scale=0.1)
    samples = responses(policy, make.MIXED, (1, 1, 1, 1))
    batch = Batch.pack(samples, policy.pad_id, policy.device)

    def run(keep_graph: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        torch.manual_seed(7)
        if keep_graph:
            first = [len(ids) for ids in batch.prompts.token_ids]
            order = split_by_tokens(first, [0] * 4, 1000)[0]
            prompts = [batch.prompts.token_ids[i] for i in order]
            padded = type(batch.prompts).pad(prompts, policy.pad_id, policy.device)
            states_PH = policy.model.base_model(
                input_ids=padded.ids_PL, attention_mask=padded.mask(0), position_ids=padded.positions(), use_cache=True
            ).last_hidden_state[:, -1]
            states_NH = states_PH[[prompts.index(ids) for ids in batch.prompts.token_ids]]
            loss(states_NH, batch).backward()
        else:
            shared = SharedPrompts(policy, batch.prompts.token_ids, 1000)
            states_NH = shared.predicting_states(batch)
            loss(states_NH, batch).backward()
            torch.rand(5)
            shared.backward()
        return states_NH.detach(), gradient(policy)

    states, expected = run(keep_graph=True)
    found_states, found = run(keep_graph=False)
    torch.testing.assert_close(found_states, states, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_cannot_share(train_config):
    assert can_share(make.policy(train_config()))
    assert not can_share(make.policy(train_config("hardware.gradient_checkpointing=true")))


def padded_size(part: Sequence[int], lengths: Sequence[int], contexts: Sequence[int]) -> float:
    return len(part) * (max(lengths[i] for i in part) + max(contexts[i] for i in part) / CONTEXT_PER_PLACE)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 400)), max_size=30), st.integers(1, 200))
def test_sequences_are_split_by_tokens(sequences: Any, budget: int) -> None:
    lengths, contexts = [n for n, _ in sequences], [c for _, c in sequences]
    parts = split_by_tokens(lengths, contexts, budget)
    assert sorted(itertools.chain(*parts)) == list(range(len(sequences)))
    for part in parts:
        assert len(part) == 1 or padded_size(part, lengths, contexts) <= budget
    # Longest first, and no part is closed while the next sequence would still have fitted.
    for part, following in itertools.pairwise(parts):
        assert min(lengths[i] for i in part) >= max(lengths[i] for i in following)
        assert padded_size([*part, following[0]], lengths, contexts) > budget


def test_equal_lengths_keep_their_order():
    assert split_by_tokens([3, 3, 3, 3], [0] * 4, 6) == [[0, 1], [2, 3]]
    assert split_by_tokens([1, 9, 2, 8], [0] * 4, 18) == [[1, 3], [2, 0]]
    assert split_by_tokens([3, 3, 3, 3], [16, 0, 0, 0], 7) == [[0], [1, 2], [3]]
    assert split_by_tokens([], [], 8) == []
