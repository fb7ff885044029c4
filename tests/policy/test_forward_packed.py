"""Samples in one row of tokens without padding, against the two other ways to run them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import make
import pytest
import torch
from test_forward import LENGTHS, micro_batches, pack, responses, run, token_ids
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from dppo_cli.commands.assembly import make_learner
from dppo_cli.policy.forward import Forward, SharedPrompts, WholeSequences
from dppo_cli.policy.packed_forward import PackedGroups
from dppo_cli.policy.policy import Policy
from dppo_cli.types import Group, Sample

PACKED = ["llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "olmo2", "gemma3", "gemma3_vision", "mistral_window"]
RECOMPUTING = "hardware.gradient_checkpointing=true"


def in_float64(policy: Policy) -> Policy:
    """transformers computes norms in float32 whatever the weights are."""
    policy.model.double()
    for module in policy.model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = norm(module.weight, module.variance_epsilon)  # type: ignore[method-assign]
        if isinstance(module, Gemma3RMSNorm):
            module.forward = norm(1 + module.weight, module.eps)  # type: ignore[method-assign]
    return policy


def norm(weight: Tensor, epsilon: float) -> Callable[[Tensor], Tensor]:
    return lambda x: weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


def compare(
    policy: Policy, expected: type[Forward], lengths: Sequence[int], owners: Sequence[int], size: int, close: float
) -> None:
    """States and gradients of `PackedGroups` and of another way, relative to the largest."""
    prompts = token_ids(policy, make.MIXED)
    batches = micro_batches(policy, responses(lengths, owners), prompts, size)
    found_NH, found = run(policy, PackedGroups(policy, prompts, 1000), batches)
    right_NH, right = run(policy, expected(policy, prompts, 1000), batches)
    assert float((found_NH - right_NH).abs().max()) < close * float(right_NH.abs().max())
    for a, b in zip(found, right, strict=True):
        assert float((a - b).abs().max()) < close * float(b.abs().max())
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("words", [(), (RECOMPUTING,)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize("lengths", [LENGTHS, (1, 1, 1, 6, 1)], ids=["mixed", "mostly one token"])
def test_states_and_gradients_are_those_of_whole_sequences(made, family, words, size, lengths):
    """Groups of different sizes, in any order, cut into micro-batches anywhere."""
    policy = in_float64(made(family, *words))
    compare(policy, WholeSequences, lengths, [2, 0, 0, 3, 1, 0], size, 1e-10)


@pytest.mark.parametrize("family", PACKED)
def test_states_and_gradients_are_those_of_shared_prompts(made, family):
    compare(in_float64(made(family)), SharedPrompts, LENGTHS, [0, 1, 2, 3], 5, 1e-10)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (1,)])
@pytest.mark.parametrize("words", [(), (RECOMPUTING,)], ids=["kept", "recomputed"])
def test_responses_of_one_token_alone(made, words, lengths):
    compare(in_float64(made("llama", *words)), WholeSequences, lengths, [1, 0, 1], 3, 1e-10)


@pytest.mark.parametrize("words", [(), (RECOMPUTING,)], ids=["kept", "recomputed"])
def test_on_a_4_bit_base(made, words):
    policy = made("llama", "adapter=qlora", *words)
    assert any(type(m).__name__ == "Linear4bit" for m in policy.model.modules())
    compare(policy, WholeSequences, LENGTHS, [0, 1, 2, 3], 5, 2e-5)


@pytest.mark.parametrize("words", [(), (RECOMPUTING,)], ids=["kept", "recomputed"])
def test_backward_passes_may_come_after_all_forward_passes(made, words):
    """Layers that recompute have the segments of their own micro-batch."""
    policy = in_float64(made("qwen3", *words))
    prompts = token_ids(policy, make.MIXED)
    batches = micro_batches(policy, responses(LENGTHS, list(prompts)), prompts, 5)
    forward = PackedGroups(policy, prompts, 1000)

    def gradient(backward: Callable[[Tensor], object]) -> list[Tensor]:
        for batch in batches:
            states = forward.predicting_states(batch)
            backward((states * batch.token_N[:, None].cos()).sum())
        return [p.grad.clone() for p in policy.parameters]

    expected = gradient(lambda loss: loss.backward())
    policy.model.zero_grad()
    losses: list[Tensor] = []
    with pytest.raises(AttributeError):  # nothing ran back yet
        gradient(losses.append)
    sum(losses).backward()  # type: ignore[union-attr]
    for p, right in zip(policy.parameters, expected, strict=True):
        torch.testing.assert_close(p.grad, right, rtol=0, atol=1e-10 * float(right.abs().max()))


def test_equal_passes_give_equal_bits(made):
    policy = made("llama")
    prompts = token_ids(policy, make.MIXED)
    batches = micro_batches(policy, responses(LENGTHS, list(prompts)), prompts, 12)
    first, second = (run(policy, PackedGroups(policy, prompts, 1000), batches) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_tokens_that_the_model_did_not_sample_have_no_state(made):
    """They are run, for later tokens attend to them."""
    policy = made("llama")
    prompts = token_ids(policy, ("1+2=",))
    sampled = [False, True, True, False, True]
    whole, part = make.completion([5, 6, 7, 8, 9]), make.completion([5, 6, 7, 8, 9], sampled=sampled)
    forward = PackedGroups(policy, prompts, 1000)
    found, every = (forward.predicting_states(pack(policy, [Sample(0, c, 1.0, c.mu)], prompts)) for c in (part, whole))
    assert torch.equal(found, every[torch.tensor(sampled)])


@pytest.mark.parametrize("words", [(), (RECOMPUTING,)], ids=["kept", "recomputed"])
def test_the_update_does_not_depend_on_the_budget(train_config, folders, words):
    """Its gradient, with groups of different sizes, is that of whole sequences."""
    config = train_config("divergence.delta_low=1", "divergence.delta_high=1", *words)
    config = replace(config, model=replace(config.model, path=str(folders["llama"])))

    def updated(budget: int, forward: type[Forward]) -> list[Tensor]:
        policy = in_float64(make.policy(config, adapter_scale=0.1))
        learner = make_learner(
            policy, replace(config, hardware=replace(config.hardware, tokens_per_micro_batch=budget))
        )
        learner.forward = forward
        generator = torch.Generator().manual_seed(0)
        sampled = [
            [make.completion(torch.randint(3, 70, (n,), generator=generator).tolist(), logp=[-4.0] * n) for n in of]
            for of in ((7, 1, 20, 4), (9,), (2, 1, 12), (3, 5))
        ]
        groups: list[Group] = make.groups(make.prompts(policy), sampled, itertools.cycle((1.0, -0.5, 0.7)))
        seen: list[Tensor] = []
        learner.optimizer.register_step_pre_hook(lambda *_: seen.extend(p.grad.clone() for p in policy.parameters))
        learner.update(groups)
        return seen

    expected = updated(1000, WholeSequences)
    for budget in (1, 30, 60, 1000):
        for found, right in zip(updated(budget, PackedGroups), expected, strict=True):
            assert right.abs().max() > 1e-3
            # Log-probs and losses are float32.
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-5 * float(right.abs().max()))


# What is run, and counted


@pytest.mark.parametrize("words", [(), (RECOMPUTING,)], ids=["kept", "recomputed"])
def test_a_prompt_runs_once_in_each_micro_batch_without_padding(made, words):
    """And a response's last token not at all, although it counts."""
    policy = made("llama", *words)
    prompts = token_ids(policy, ("1+2=", "hello", "a"))
    samples = responses((3, 1, 3, 1, 9, 1), [0, 1])
    forward = PackedGroups(policy, prompts, 1000)
    shapes: list[tuple[int, ...]] = []
    hook = policy.model.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    run(policy, forward, [pack(policy, half, prompts) for half in (samples[:4], samples[4:])])
    hook.remove()
    assert shapes == [(1, 4 + 5 + 2 + 2), (1, 4 + 5 + 8)]
    assert forward.num_positions == forward.num_tokens == (9 + 3 + 1 + 3 + 1) + (9 + 9 + 1)


def test_without_segments_attention_is_that_of_transformers():
    attention = AttentionInterface()["sdpa"]
    assert attention is not sdpa_attention_forward
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 7, 8, generator=generator) for heads in (4, 2))
    seen = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    seen[1, :, :, 0] = False
    seen[1, :, 0, 0] = True
    module: Any = nn.Module()
    module.num_key_value_groups = 2
    for mask in (None, seen):
        given_ = dict(scaling=0.2, dropout=0.0, position_ids=torch.arange(7)[None])
        found, expected = (of(module, q, k, k, mask, **given_)[0] for of in (attention, sdpa_attention_forward))
        assert torch.equal(found, expected) and found.shape == (2, 7, 4, 8)


def test_segments_that_do_not_arrive_are_an_error(made, monkeypatch):
    """Never a row of tokens that attend to one another as if they were one text."""
    policy = made("llama")
    prompts = token_ids(policy, ("1+2=", "hello"))
    batch = pack(policy, responses((3, 4), [0, 1]), prompts)
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa_attention_forward)
    with pytest.raises(RuntimeError, match="attn_mask"):
        PackedGroups(policy, prompts, 1000).predicting_states(batch)
