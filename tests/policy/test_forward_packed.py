"""Samples in one row of tokens without padding, against the two other ways to run them."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import pytest
import tiny_models
import torch
from test_forward import LENGTHS, micro_batches, pack, responses, run, token_ids
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from dppo_cli.commands.train import make_learner
from dppo_cli.policy import choice
from dppo_cli.policy.choice import choose_for, choose_forward
from dppo_cli.policy.forward import Forward, SharedPrompts, WholeSequences
from dppo_cli.policy.packed_forward import PackedGroups, can_pack
from dppo_cli.policy.policy import Policy
from dppo_cli.types import Group, Sample

PACKED = ["llama", "qwen2", "qwen3", "mistral", "phi3", "smollm3", "olmo2", "gemma3", "gemma3_vision", "mistral_window"]
REFUSED = ["gemma2", "cohere2"]
RECOMPUTING = "hardware.gradient_checkpointing=true"

Make = Callable[..., Policy]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: tiny_models.save(root / family, family) for family in tiny_models.FAMILIES}


@pytest.fixture
def made(train_config, folders: dict[str, Path]) -> Make:
    """`made("qwen3", "adapter=qlora")`: a policy whose adapter has an effect."""

    def policy(family: str, *words: str) -> Policy:
        config = train_config(*words)
        return make.policy(replace(config, model=replace(config.model, path=str(folders[family]))), adapter_scale=0.1)

    return policy


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


# Which models


@pytest.mark.parametrize("family", [*PACKED, *REFUSED])
def test_which_models_are_packed_while_recomputing(made, family):
    """Soft caps and models whose layers are not known run as they did."""
    assert set(PACKED) | set(REFUSED) == set(tiny_models.FAMILIES)
    policy = made(family, RECOMPUTING)
    assert can_pack(policy.model) == (family in PACKED)
    assert choose_forward(policy, 90) is (PackedGroups if family in PACKED else WholeSequences)
    assert choose_forward(made(family), 90) is SharedPrompts


@pytest.mark.parametrize(
    ("prompt", "own", "budget", "expected"),
    [
        # Prompts twice each instead of three times.
        (50, (20, 20, 20), 1000, PackedGroups),
        # Each prompt in three micro-batches, and nothing to gain from padding.
        (50, (20, 20, 20), 70, SharedPrompts),
        # The same, but most of what runs would be padding.
        (3, (40, 1, 1), 120, PackedGroups),
    ],
)
def test_samples_are_packed_where_fewer_tokens_run(made, monkeypatch, prompt, own, budget, expected):
    prompts = {number: tuple(range(number, number + prompt)) for number in (0, 4)}
    samples = [(number, prompt, n) for number in prompts for n in own]
    policy = made("llama")
    assert choose_for(policy, prompts, samples, budget) is expected
    for words, family in (((), "gemma2"), ((RECOMPUTING,), "gemma2"), ((RECOMPUTING,), "llama")):
        other = made(family, *words)
        assert choose_for(other, prompts, samples, budget) is choose_forward(other, 90)


@pytest.mark.parametrize("words", [(), (RECOMPUTING,)], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("family", "window", "longest", "asked"),
    [
        ("llama", 64, 70, {False}),
        ("gemma3", 64, 70, {False, True}),
        ("gemma3", 80, 70, {False}),
        ("mistral_window", 64, 70, {True}),
    ],
)
def test_rows_are_packed_where_attention_over_them_has_a_kernel(
    train_config, tmp_path, monkeypatch, family, window, longest, asked, words
):
    """On a GPU: that for layers whose window is passed, and that for others."""
    sizes = {"sliding_window": window} if family != "llama" else {}
    folder = tiny_models.save(tmp_path / family, family, **sizes)
    policy = make.policy(train_config(f"model.path={folder}", *words))
    prompts, samples = {0: tuple(range(50))}, [(0, 50, 20), (0, 50, longest - 50)]
    of = policy.model.config
    heads = of.num_attention_heads, of.num_key_value_heads, of.head_dim
    slow = WholeSequences if words else SharedPrompts
    for device, refused, kind in (("cuda", None, PackedGroups), ("cuda", "it is off", slow), ("mps", None, slow)):
        calls: set[bool] = set()

        def why(dtype, *shape, windows, calls=calls, refused=refused):
            assert dtype == torch.float32 and shape == heads
            calls.add(windows)
            return refused if windows == max(asked) else None

        monkeypatch.setattr(choice, "why_not_flash", why)
        there = replace(policy, device=torch.device(device))
        assert choose_for(there, prompts, samples, 1000) is kind
        assert calls == (asked if device == "cuda" else set())
        said: list[str] = []
        choice.warn_of_padding(policy.model, torch.device(device), torch.float32, said.append)
        assert said == ([choice.NOT_PACKED.format(refused)] if refused else [])


def test_what_prompts_begin_with_is_counted_once(made):
    """Packed, it would run for each prompt."""
    policy, beginning = made("llama"), tuple(range(100))
    samples = [(number, 101, 20) for number in (0, 1, 2) for _ in range(2)]
    alike = {number: (*beginning, number) for number in (0, 1, 2)}
    apart = {number: (number, *beginning) for number in (0, 1, 2)}
    assert choose_for(policy, alike, samples, 1000) is SharedPrompts
    assert choose_for(policy, apart, samples, 1000) is PackedGroups


def test_another_attention_is_not_packed(made):
    policy = made("llama", RECOMPUTING)
    policy.model.set_attn_implementation("eager")
    assert not can_pack(policy.model) and choose_forward(policy, 90) is WholeSequences


def test_an_unknown_layer_is_not_packed(made):
    policy = made("llama", RECOMPUTING)

    class Other(type(policy.model.base_model.layers[0])):  # type: ignore[misc]
        pass

    policy.model.base_model.layers[1].__class__ = Other
    assert not can_pack(policy.model)


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
