"""Which way updates run, by model, device and samples."""

from dataclasses import replace

import make
import pytest
import tiny_models
import torch
from test_forward_packed import PACKED, RECOMPUTING

from dppo_cli.policy import choice
from dppo_cli.policy.choice import choose_for, choose_forward
from dppo_cli.policy.forward import SharedPrompts, WholeSequences
from dppo_cli.policy.packed_forward import PackedGroups, can_pack

REFUSED = ["gemma2", "cohere2"]


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
