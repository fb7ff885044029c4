"""Samples without advantage, and every combination of objective, divergence, approximation and anchor."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import make
import pytest
import torch
from updates import (
    ADVANTAGES,
    MASKING,
    OVER_RESPONSES,
    UNCLIPPED,
    assert_equal_gradients,
    assert_identical,
    completions,
    dense_gradient,
    gradient,
    masked,
    off_policy,
    parameters,
    response_lengths,
    rollout,
)

from dppo_cli.algorithm.loss import uses_region
from dppo_cli.algorithm.objective import Objective, TokenLoss, Tokens
from dppo_cli.commands.assembly import make_learner
from dppo_cli.config import conf_tree
from dppo_cli.types import TokenStats


@dataclass(frozen=True)
class Everything:
    """An objective that asks for tokens without advantage, too, although they give nothing."""

    inner: Objective

    needs_all_tokens = True

    @property
    def uses_region(self) -> bool:
        return uses_region(self.inner)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return self.inner(tokens)


@pytest.mark.parametrize(
    "words",
    [*((f"objective={objective}",) for objective in ("dppo", "ppo", "gspo", "drpo", "pg_is")), *OVER_RESPONSES],
)
@pytest.mark.parametrize("budget", [10**6, 64])
def test_skipping_samples_without_advantage_leaves_the_gradient_bit_for_bit(train_config, words, budget):
    config = train_config(*words, *MASKING, UNCLIPPED, f"hardware.tokens_per_micro_batch={budget}")
    advantages = (0.0, -0.5, 0.0, -1.5, 0.75, 0.0, -1.0, 0.0)
    policy, groups = off_policy(config, advantages)
    without, skipping = gradient(make_learner(policy, config), groups)
    policy, groups = off_policy(config, advantages)
    everything = replace(config, objective=Everything(config.objective))
    with_all, running = gradient(make_learner(policy, everything), groups)
    assert (skipping.skipped_sequences, running.skipped_sequences) == (4, 0)
    assert skipping.sequences == running.sequences == 8
    assert skipping.num_positions < running.num_positions
    assert_identical(without, with_all)
    assert any(g.abs().max() > 0 for g in without)


def test_what_a_filter_drops_stays_in_the_divisor(train_config):
    """The gradient is that of the same batch in which the dropped responses have no advantage."""
    wide = (UNCLIPPED, "divergence.delta_low=1", "divergence.delta_high=1")
    policy, groups = off_policy(config := train_config(*wide, "filter=opsm"))
    found, result = gradient(make_learner(policy, config), groups)
    seen = TokenStats.cat(result.stats)
    of_each = seen.filtered_N.split([len(c.mu.logp_N) for c in completions(groups)])
    dropped = [bool(of.all()) for of in of_each]
    assert dropped == [bool(of.any()) for of in of_each] and 0 < sum(dropped) < len(dropped)
    left = iter([0.0 if gone else a for gone, a in zip(dropped, ADVANTAGES, strict=True)])
    assert all(a < 0 for gone, a in zip(dropped, ADVANTAGES, strict=True) if gone)
    policy, groups = off_policy(config := train_config(*wide))
    less = [replace(group, advantages=[next(left) for _ in group.completions]) for group in groups]
    expected, _ = gradient(make_learner(policy, config), less)
    assert_equal_gradients(found, expected)


def test_a_batch_without_any_advantage_changes_nothing(train_config):
    config = train_config("optim.weight_decay=0.0")
    policy, groups = off_policy(config, [0.0] * 8)
    before = parameters(policy)
    result = make_learner(policy, config).update(groups)
    assert_identical(parameters(policy), before)
    assert (result.stats, result.gradient_norm, result.skipped_sequences, result.num_positions) == ([], 0.0, 8, 0)


@pytest.mark.parametrize("override", ["objective=ipo", "kl_to_reference=0.1"])
def test_terms_without_advantage_train_every_sample(train_config, override):
    config = train_config(override, UNCLIPPED)
    policy, groups = off_policy(config, [0.0] * 8)
    found, result = gradient(make_learner(policy, config), groups)
    assert result.skipped_sequences == 0
    assert all(g.abs().max() > 0 for g in found)


def test_skipped_samples_count_in_the_divisor(train_config):
    """A = 0 is a zero in the mean, not an absence."""
    config = train_config(UNCLIPPED)
    policy, groups = off_policy(config, (1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    expected = dense_gradient(policy, config, groups)
    found, _ = gradient(make_learner(policy, config), groups)
    assert_equal_gradients(found, expected)


CHOICES = {name: conf_tree.groups()[name] for name in ("objective", "divergence", "approx")}


def test_every_combination_runs_an_update(train_config):
    base = train_config("optim.lr=1e-3", "sampling.max_new_tokens=4", "adapter.target_modules=[q_proj,down_proj]")
    # One config holds a choice of each group, so that few of them need composing.
    found: dict[str, dict[str, Any]] = {name: {} for name in CHOICES}
    for picked in itertools.zip_longest(*CHOICES.values()):
        words = {g: c or CHOICES[g][0] for g, c in zip(CHOICES, picked, strict=True)}
        config = train_config(*(f"{group}={choice}" for group, choice in words.items()))
        for group, choice in words.items():
            found[group][choice] = getattr(config, group)
    assert {name: sorted(choices) for name, choices in found.items()} == CHOICES
    # Loading and sampling once is enough: what the policy was before an update can be put back.
    policy = make.policy(base, adapter_scale=0.05, seed=1)
    rollouts = {choice: rollout(policy, replace(base, approx=approx)) for choice, approx in found["approx"].items()}
    make.move_adapter(policy, 0.08, seed=2)
    before = parameters(policy)
    combinations = list(itertools.product(*CHOICES.values(), ("rollout", "recompute")))
    assert len(combinations) >= 10 * 2 * 3 * 2
    for *chosen, anchor in combinations:
        options = {group: found[group][choice] for group, choice in zip(CHOICES, chosen, strict=True)}
        config = replace(base, **options, anchor=anchor)
        for parameter, value in zip(policy.parameters, before, strict=True):
            parameter.data.copy_(value)
        groups = rollouts[chosen[-1]]
        learner = make_learner(policy, config)
        if anchor == "recompute":
            groups = learner.anchored(groups)
        result = learner.update(groups)
        seen = TokenStats.cat(result.stats)
        assert math.isfinite(result.gradient_norm)
        assert (result.gradient_norm > 0) == bool(seen.keep_N.any() or config.objective.needs_all_tokens)
        assert torch.isfinite(seen.divergence_N).all()
        assert (seen.divergence_N.max() > 0.01) == (anchor == "rollout")
        assert all(torch.isfinite(p).all() for p in policy.parameters)
        assert any(not torch.equal(p, b) for p, b in zip(policy.parameters, before, strict=True)) == (
            result.gradient_norm > 0
        )


# Anchors and the reference


@pytest.mark.parametrize("approx", ["binary", "topk", "full"])
def test_recomputing_an_anchor_that_agrees_gives_the_same_update(train_config, approx):
    config = train_config(f"approx={approx}", "approx.k=5" if approx == "topk" else "steps=4", UNCLIPPED)
    policy = make.policy(config, adapter_scale=0.05)
    groups = rollout(policy, config)
    anchored = make_learner(policy, config).anchored(groups)
    for group, again in zip(groups, anchored, strict=True):
        assert group.anchors is None, "mu is the anchor"
        assert again.completions is group.completions
        for completion, anchor in zip(group.completions, again.anchors, strict=True):
            mu = completion.mu
            torch.testing.assert_close(anchor.logp_N, mu.logp_N, rtol=1e-5, atol=1e-5)
            if approx == "topk":
                assert anchor.topk_ids_NK.shape == mu.topk_ids_NK.shape
                torch.testing.assert_close(anchor.topk_logp_NK, mu.topk_logp_NK, rtol=1e-5, atol=1e-5)
            if approx == "full":
                torch.testing.assert_close(anchor.full_log_probs(), mu.full_log_probs(), rtol=1e-5, atol=2e-5)
    first, _ = gradient(make_learner(policy, config), groups)
    policy = make.policy(config, adapter_scale=0.05)
    second, _ = gradient(make_learner(policy, config), anchored)
    assert_equal_gradients(second, first)


@pytest.mark.parametrize("approx", ["binary", "topk", "full"])
def test_the_trust_region_is_centred_on_the_anchor_and_the_weight_on_mu(train_config, approx):
    config = train_config(f"approx={approx}", *MASKING, UNCLIPPED, "objective.ratio_cap=null")
    policy, groups = off_policy(config)
    learner = make_learner(policy, config)
    anchored = learner.anchored(groups)
    around_mu, found = gradient(learner, groups)
    assert masked(found) > 5

    policy, _ = off_policy(config)
    around_pi, found = gradient(make_learner(policy, config), anchored)
    assert masked(found) == 0, "pi has not left itself"
    assert max(float(part.divergence_N.max()) for part in found.stats) < 1e-5
    policy, _ = off_policy(config)
    unmasked = replace(config, divergence=replace(config.divergence, delta_low=1.0, delta_high=1.0))
    weighted_by_mu = dense_gradient(policy, unmasked, groups)
    assert_equal_gradients(around_pi, weighted_by_mu)
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(around_mu, around_pi, strict=True))


def test_a_fresh_adapter_is_its_own_reference(train_config):
    with_term = train_config("kl_to_reference=0.5", UNCLIPPED)
    without_term = replace(with_term, kl_to_reference=0.0)
    gradients, results = [], []
    for config in (with_term, without_term):
        policy = make.policy(config)
        found, result = gradient(make_learner(policy, config), rollout(policy, config))
        gradients.append(found)
        results.append(result)
    assert_identical(*gradients)
    assert all(part.reference_kl_N.abs().max() == 0 for part in results[0].stats)


def test_the_reference_term_changes_the_gradient_of_a_moved_adapter(train_config):
    """By how much: see the dense implementation. The figure is log pi/ref of the sampled tokens."""
    config = train_config("hardware.tokens_per_micro_batch=1000000", UNCLIPPED)
    policy, groups = off_policy(config)
    prompts, sampled = [g.prompt for g in groups], [g.completions for g in groups]
    log_pi_NV = make.trained_log_probs(policy, prompts, sampled, 1.0)
    with policy.without_adapter():
        log_ref_NV = make.trained_log_probs(policy, prompts, sampled, 1.0)
    token_N = torch.cat([c.token_ids_T for c in completions(groups)])
    of_response = (log_pi_NV - log_ref_NV).gather(-1, token_N[:, None])[:, 0].split(response_lengths(groups))
    expected_N = torch.cat(sorted(of_response, key=lambda part: -len(part)))  # as one batch holds them
    without, result = gradient(make_learner(policy, config), groups)
    assert all(part.reference_kl_N.abs().max() == 0 for part in result.stats)
    policy, _ = off_policy(config)
    with_term, result = gradient(make_learner(policy, replace(config, kl_to_reference=0.5)), groups)
    torch.testing.assert_close(TokenStats.cat(result.stats).reference_kl_N, expected_N, rtol=1e-4, atol=1e-5)
    assert any((a - b).abs().max() > 0.05 * a.abs().max() for a, b in zip(without, with_term, strict=True))
