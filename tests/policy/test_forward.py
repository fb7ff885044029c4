"""Shared prompts and whole sequences, against a forward pass over every whole sequence."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import make
import pytest
import tiny
import torch

import dppo_cli
from dppo_cli.policy.forward import (
    Forward,
    SharedPrompts,
    WholeSequences,
    hidden_states,
    split_by_tokens,
)
from dppo_cli.policy.policy import Policy
from dppo_cli.types import Batch, PaddedPrompts, Sample

architectures = pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
both = pytest.mark.parametrize("kind", [SharedPrompts, WholeSequences])
LENGTHS = (7, 1, 20, 4, 9, 2, 1, 12, 3, 5, 16, 2)


def token_ids(policy: Policy, texts: Sequence[str]) -> dict[int, tuple[int, ...]]:
    """By the prompt's number."""
    return {prompt.index: prompt.token_ids for prompt in make.prompts(policy, texts)}


def responses(lengths: Sequence[int], prompts: Sequence[int]) -> list[Sample]:
    """Responses of random tokens to each of the prompts in turn."""
    generator = torch.Generator().manual_seed(0)
    completions = [make.completion(torch.randint(3, 70, (length,), generator=generator).tolist()) for length in lengths]
    return [Sample(prompts[i % len(prompts)], c, 1.0, c.mu) for i, c in enumerate(completions)]


def pack(policy: Policy, samples: Sequence[Sample], prompts: dict[int, tuple[int, ...]]) -> Batch:
    return Batch.pack(samples, list(prompts.values()), policy.pad_id, policy.device)


def micro_batches(
    policy: Policy, samples: Sequence[Sample], prompts: dict[int, tuple[int, ...]], size: int
) -> list[Batch]:
    return [pack(policy, samples[i : i + size], prompts) for i in range(0, len(samples), size)]


def loss(states_NH: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A random direction for each position of a response, the same in whatever batch the response is."""
    direction_RH = torch.randn(64, states_NH.shape[1], generator=torch.Generator().manual_seed(1))
    return (states_NH * direction_RH[batch.position_N] * batch.token_N[:, None].float().cos()).sum()


def gradient(policy: Policy) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in policy.parameters]
    policy.model.zero_grad()
    return found


def run(policy: Policy, forward: Forward, batches: Sequence[Batch]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """States of all batches and the adapter's gradient."""
    states = []
    for batch in batches:
        states_NH = forward.predicting_states(batch)
        loss(states_NH, batch).backward()
        states.append(states_NH.detach())
    forward.backward()
    return torch.cat(states), gradient(policy)


@contextmanager
def forward_passes(policy: Policy) -> Iterator[list[torch.Tensor]]:
    """For each forward pass of the base model, a tensor of its tokens' shape: True for tokens, False for padding."""
    calls: list[torch.Tensor] = []

    def note(_: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        attended = torch.ones_like(ids) if mask is None else mask[:, -ids.shape[1] :]
        calls.append((ids != policy.pad_id) & attended.bool())

    hook = policy.model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    yield calls
    hook.remove()


def counted(calls: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Positions and tokens."""
    return sum(real.numel() for real in calls), sum(int(real.sum()) for real in calls)


@architectures
@pytest.mark.parametrize(
    "texts", [make.MIXED, ("3+4=", "a - "), make.ALIKE], ids=["padded", "equal lengths", "begin alike"]
)
@pytest.mark.parametrize("lengths", [LENGTHS, (1,) * 8], ids=["mixed", "one token"])
@pytest.mark.parametrize("budget", [1, 30, 1000])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_states_and_gradients_are_those_of_whole_sequences(train_config, architecture, texts, lengths, budget, size):
    """Whatever number of prompts runs at a time, and whatever number of responses."""
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    prompts = token_ids(policy, texts)
    samples = responses(lengths, list(prompts))
    batches = micro_batches(policy, samples, prompts, size)
    found_NH, found_gradient = run(policy, SharedPrompts(policy, prompts, budget), batches)

    batch = pack(policy, samples, prompts)
    start_N = batch.prompts.length_P1[batch.prompt_B[batch.row_N], 0]
    whole_BXH = hidden_states(policy, batch.whole_ids(policy.pad_id))
    whole_NH = whole_BXH[batch.row_N, start_N + batch.position_N - 1]
    loss(whole_NH, batch).backward()
    torch.testing.assert_close(found_NH, whole_NH.detach(), rtol=1e-5, atol=2e-5)
    for found, expected in zip(found_gradient, gradient(policy), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert expected.abs().max() > 1e-3


@architectures
@pytest.mark.parametrize("size", [1, 5, 12])
def test_both_kinds_give_the_same_states_and_gradients(train_config, architecture, size):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    prompts = token_ids(policy, make.MIXED)
    batches = micro_batches(policy, responses(LENGTHS, list(prompts)), prompts, size)
    shared_NH, shared_gradient = run(policy, SharedPrompts(policy, prompts, 1000), batches)
    whole_NH, whole_gradient = run(policy, WholeSequences(policy, prompts, 1000), batches)
    torch.testing.assert_close(shared_NH, whole_NH, rtol=1e-5, atol=2e-5)
    for shared, whole in zip(shared_gradient, whole_gradient, strict=True):
        torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-4)
        assert whole.abs().max() > 1e-3


@both
def test_some_of_an_updates_prompts_can_run_by_themselves(train_config, kind):
    """By their number among all prompts, which is not their row here. Two numbers may have the same tokens."""
    policy = make.policy(train_config(), adapter_scale=0.1)
    every = token_ids(policy, ("abc", "1+2=", "hello world", "1+2="))
    some = {number: every[number] for number in (3, 2, 1)}
    batches = micro_batches(policy, responses((4, 2, 6, 1, 3), [2, 3, 1]), every, 2)
    found_NH, found_gradient = run(policy, kind(policy, some, 1000), batches)
    expected_NH, expected_gradient = run(policy, kind(policy, every, 1000), batches)
    torch.testing.assert_close(found_NH, expected_NH, rtol=1e-5, atol=2e-5)
    for found, expected in zip(found_gradient, expected_gradient, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@both
def test_tokens_that_the_model_did_not_sample_have_no_state(train_config, kind):
    """They are run, for later tokens attend to them."""
    policy = make.policy(train_config(), adapter_scale=0.1)
    prompts = token_ids(policy, ("1+2=",))
    sampled = [False, True, True, False, True]
    whole, part = make.completion([5, 6, 7, 8, 9]), make.completion([5, 6, 7, 8, 9], sampled=sampled)

    def states(of) -> torch.Tensor:
        with torch.no_grad():
            return kind(policy, prompts, 1000).predicting_states(pack(policy, [Sample(0, of, 1.0, of.mu)], prompts))

    assert torch.equal(states(part), states(whole)[torch.tensor(sampled)])


# What is run, and counted


@architectures
@pytest.mark.parametrize("texts", [make.MIXED, make.ALIKE], ids=["padded", "begin alike"])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_whole_sequences_count_what_they_run(train_config, architecture, texts, size):
    policy = make.policy(train_config(model=architecture))
    prompts = token_ids(policy, texts)
    forward = WholeSequences(policy, prompts, 1000)
    with forward_passes(policy) as calls:
        for batch in micro_batches(policy, responses(LENGTHS, list(prompts)), prompts, size):
            forward.predicting_states(batch)
    assert (forward.num_positions, forward.num_tokens) == counted(calls)


@architectures
@pytest.mark.parametrize("texts", [make.MIXED, make.ALIKE], ids=["padded", "begin alike"])
@pytest.mark.parametrize("budget", [30, 1000])
@pytest.mark.parametrize("size", [1, 5, 12])
def test_shared_prompts_count_what_they_run(train_config, architecture, texts, budget, size):
    """And each response's last column, which need not run: no token is predicted from it."""
    policy = make.policy(train_config(model=architecture))
    prompts = token_ids(policy, texts)
    batches = micro_batches(policy, responses(LENGTHS, list(prompts)), prompts, size)
    with forward_passes(policy) as calls:
        forward = SharedPrompts(policy, prompts, budget)
        assert (forward.num_positions, forward.num_tokens) == counted(calls)
        for batch in batches:
            forward.predicting_states(batch)
    last = [batch.response_ids_BR[:, -1] != policy.pad_id for batch in batches]
    assert (forward.num_positions, forward.num_tokens) == counted([*calls, *last])


def test_a_prompt_runs_twice_however_many_responses_it_has(train_config):
    """Once for its states, once going back; responses of one token need no forward pass of their own."""
    policy = make.policy(train_config())
    prompts = token_ids(policy, ("1+2=", "hello"))
    samples = responses((3, 1, 3, 1), [0, 1])
    with forward_passes(policy) as calls:
        shared = SharedPrompts(policy, prompts, 1000)
        assert (shared.num_positions, shared.num_tokens) == (10, 9)
        run(policy, shared, [pack(policy, pair, prompts) for pair in (samples[0::2], samples[1::2])])
    assert [tuple(real.shape) for real in calls] == [(2, 5), (2, 2), (2, 5)]


def test_what_all_prompts_begin_with_counts_once(train_config):
    policy = make.policy(train_config())
    shared = SharedPrompts(policy, token_ids(policy, make.ALIKE), 1000)
    beginning, longest, tokens = len(make.BEGINNING), len(make.ALIKE[1]), sum(map(len, make.ALIKE))
    assert shared.num_positions == beginning + 4 * (longest - beginning)
    assert shared.num_tokens == tokens - 3 * beginning


# Gradient


def test_without_gradient_nothing_is_kept_for_one(train_config):
    policy = make.policy(train_config(), adapter_scale=0.1)
    prompts = token_ids(policy, make.MIXED)
    batch = pack(policy, responses((7, 1, 20, 4), list(prompts)), prompts)
    expected = SharedPrompts(policy, prompts, 1000).predicting_states(batch)
    with torch.no_grad():
        shared = SharedPrompts(policy, prompts, 1000)
        found = shared.predicting_states(batch)
    assert torch.equal(found, expected)
    assert expected.requires_grad and not any(state.requires_grad for state in shared.states)


def test_the_adapters_dropout_is_drawn_once(train_config):
    """Going back, the prompts run with the dropout that they had: the gradient is that of the states that were used."""
    policy = make.policy(train_config("adapter.dropout=0.5"), adapter_scale=0.1)
    prompts = token_ids(policy, make.MIXED)
    batch = pack(policy, responses((1, 1, 1, 1), list(prompts)), prompts)

    torch.manual_seed(7)
    order = split_by_tokens([len(ids) for ids in prompts.values()], [0] * 4, 1000)[0]
    padded = PaddedPrompts.pad([prompts[i] for i in order], policy.pad_id, policy.device)
    states_PH = policy.model.base_model(
        input_ids=padded.ids_PL, attention_mask=padded.mask(0), position_ids=padded.positions(), use_cache=True
    ).last_hidden_state[:, -1]
    states_NH = states_PH[[order.index(number) for number in prompts]]
    loss(states_NH, batch).backward()
    expected_gradient = gradient(policy)

    torch.manual_seed(7)
    shared = SharedPrompts(policy, prompts, 1000)
    found_NH = shared.predicting_states(batch)
    loss(found_NH, batch).backward()
    torch.rand(5)
    shared.backward()
    torch.testing.assert_close(found_NH.detach(), states_NH.detach(), rtol=1e-5, atol=1e-5)
    for found, expected in zip(gradient(policy), expected_gradient, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# One place


def test_one_place_runs_the_base_model():
    package = Path(dppo_cli.__file__).parent
    texts = {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in package.rglob("*.py")}
    assert {name: text.count("base_model(") for name, text in texts.items() if "base_model(" in text} == {
        "policy/forward.py": 1
    }
