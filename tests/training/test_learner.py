"""The gradient of an update: against a dense implementation, and everything that must not change it."""

import math
from dataclasses import replace
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
    response_lengths,
    with_budget,
)

from dppo_cli.algorithm.divergence import TotalVariation
from dppo_cli.commands.assembly import make_learner
from dppo_cli.policy.forward import SharedPrompts, WholeSequences
from dppo_cli.types import Group


@pytest.mark.parametrize("model", ["llama3", "gpt2", "gemma2", "cohere2"])
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_the_gradient_is_that_of_a_dense_implementation(train_config, model, kl):
    config = train_config(UNCLIPPED, "sampling.temperature=0.7", f"kl_to_reference={kl}", model=model)
    config = with_budget(config, 25, head_chunk=7)
    delta = 0.001 if model == "cohere2" else 0.01  # Cohere's small scale leaves it nearly uniform
    config = replace(config, divergence=TotalVariation(delta_low=delta, delta_high=2 * delta))
    policy, groups = off_policy(config)
    expected = dense_gradient(policy, config, groups)
    found, result = gradient(make_learner(policy, config), groups)
    tokens = sum(response_lengths(groups))
    assert 0.1 * tokens < masked(result) < 0.9 * tokens
    assert len(result.stats) > 2, "several micro-batches, several chunks"
    assert_equal_gradients(found, expected)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected))
    assert result.gradient_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize(
    "words",
    [("objective=dppo",), ("objective=gspo",), ("objective=ipo",), *OVER_RESPONSES],
)
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(train_config, words):
    config = train_config(*words, *MASKING, UNCLIPPED, "kl_to_reference=0.1", "approx=topk")
    gradients, positions, counts = [], [], []
    for budget, chunk in ((10**6, 10**6), (1, 256), (64, 3)):
        policy, groups = off_policy(config)
        learner = make_learner(policy, with_budget(config, budget, chunk))
        learner.forward = SharedPrompts
        found, result = gradient(learner, groups)
        gradients.append(found)
        positions.append((result.num_positions, result.num_padding))
        counts.append(len(result.stats))
    assert_equal_gradients(gradients[1], gradients[0])
    assert_equal_gradients(gradients[2], gradients[0])
    responses = response_lengths(groups)
    prompts = [len(group.prompt.token_ids) for group in groups]
    whole = 4 * max(prompts) + 8 * max(responses)
    assert positions[0] == (whole, whole - sum(prompts) - sum(responses)), "both samples of a prompt share it"
    assert positions[1] == (sum(prompts) + sum(responses), 0), "however the responses are cut, a prompt runs once"
    assert counts[:2] == [1, 8]
    assert 1 < counts[2] < 8


@pytest.mark.parametrize("forward", [SharedPrompts, WholeSequences])
def test_what_stands_in_the_padding_does_not_matter(train_config, forward):
    config = train_config(UNCLIPPED)
    found = []
    for pad_id in (0, 40):
        policy, groups = off_policy(config)
        learner = make_learner(replace(policy, pad_id=pad_id), config)
        learner.forward = forward
        gradients, result = gradient(learner, groups)
        found.append(gradients)
        assert result.num_padding > 0
    assert_identical(*found)


def of_sizes(groups: list[Group], *sizes: int) -> list[Group]:
    """The first completions of each group."""
    return [
        Group(group.prompt, group.completions[:n], group.scores[:n], group.advantages[:n])
        for group, n in zip(groups, sizes, strict=False)
    ]


@pytest.mark.parametrize("budget", [10**6, 25])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["shared_prompts", "packed_groups"])
def test_groups_may_differ_in_size(train_config, checkpointing, budget):
    """Where an engine lost completions, or gave more. An empty group adds nothing, and its prompt does not run."""
    config = train_config(
        *MASKING, UNCLIPPED, "kl_to_reference=0.5", f"hardware.gradient_checkpointing={str(checkpointing).lower()}"
    )
    config = with_budget(config, budget)
    policy, groups = off_policy(config, (*ADVANTAGES, 1.5, -2.0, 0.1, -0.75), samples_per_prompt=3)
    groups = of_sizes(groups, 1, 3, 0)
    assert [len(group.completions) for group in groups] == [1, 3, 0]
    expected = dense_gradient(policy, config, groups)
    found, result = gradient(make_learner(policy, config), groups)
    assert_equal_gradients(found, expected)
    assert 0 < masked(result) < sum(response_lengths(groups))
    assert (result.sequences, result.skipped_sequences) == (4, 0)
    prompts = [len(group.prompt.token_ids) for group in groups]
    # A row of 25 tokens holds one of the three.
    runs = prompts[0] + (3 if checkpointing and budget == 25 else 1) * prompts[1]
    assert result.num_positions - result.num_padding == runs + sum(response_lengths(groups))


def test_groups_of_different_sizes_keep_their_own_anchors(train_config):
    config = train_config("sampling.temperature=0.7")
    policy, groups = off_policy(config, [*ADVANTAGES, *ADVANTAGES[:4]], samples_per_prompt=3)
    groups = of_sizes(groups, 1, 3, 0)
    log_pi_NV = make.trained_log_probs(policy, [g.prompt for g in groups], [g.completions for g in groups], 0.7)
    token_N = torch.cat([c.token_ids_T for c in completions(groups)])
    expected_N = log_pi_NV.gather(-1, token_N[:, None])[:, 0]
    anchored = make_learner(policy, with_budget(config, 25)).anchored(groups)
    assert [len(group.anchors) for group in anchored] == [1, 3, 0]
    found_N = torch.cat([anchor.logp_N for group in anchored for anchor in group.anchors])
    torch.testing.assert_close(found_N, expected_N, rtol=1e-5, atol=1e-5)


def test_an_update_of_empty_groups_changes_nothing(train_config):
    config = train_config("kl_to_reference=0.5")
    policy, groups = off_policy(config)
    found, result = gradient(make_learner(policy, config), of_sizes(groups, 0, 0))
    assert all(g.abs().max() == 0 for g in found)
    assert (result.stats, result.gradient_norm, result.sequences, result.num_positions) == ([], 0.0, 0, 0)


@pytest.mark.parametrize("model", ["llama3", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradient(train_config, model):
    plain = train_config(UNCLIPPED, "kl_to_reference=0.1", model=model)
    recomputing = replace(plain, hardware=replace(plain.hardware, gradient_checkpointing=True))
    gradients, calls = [], []
    for config in (plain, recomputing):
        policy, groups = off_policy(config)
        layer = next(m for name, m in policy.model.named_modules() if name.endswith(".0.mlp"))
        calls.append(0)

        def count(*_: Any) -> None:
            calls[-1] += 1

        hook = layer.register_forward_pre_hook(count)
        gradients.append(gradient(make_learner(policy, config), groups)[0])
        hook.remove()
    # Packed, a row for pi and one for the reference, and pi's again going back if layers recompute. GPT-2 is not
    # packed: prompts and responses for both, and pi's prompts again going back; whole sequences for both, pi's again.
    assert calls == ([2, 3] if model == "llama3" else [5, 3])
    assert_equal_gradients(gradients[1], gradients[0])


def test_tokens_that_the_model_did_not_sample_have_no_loss(train_config):
    """They stay in the sequence, and later tokens attend to them; loss, divisor and figures leave them out."""
    config = train_config(*MASKING, UNCLIPPED)
    policy, groups = off_policy(config)
    part, i = [], 0
    for group in groups:
        row = []
        for completion in group.completions:
            sampled_T = torch.ones_like(completion.sampled_T)
            sampled_T[1 + i % 3 : 3 + i % 3] = False
            row.append(replace(completion, sampled_T=sampled_T, mu=completion.mu[sampled_T]))
            i += 1
        part.append(replace(group, completions=row))
    expected = dense_gradient(policy, config, part)
    found, result = gradient(make_learner(policy, config), part)
    assert_equal_gradients(found, expected)
    seen = torch.cat([stats.token_N for stats in result.stats])
    own = torch.cat([c.token_ids_T[c.sampled_T] for c in completions(part)])
    assert sorted(seen.tolist()) == sorted(own.tolist())
    assert len(own) < sum(response_lengths(part))


def test_figures_of_an_update(train_config):
    """What the statistics hold, token by token, against the dense distribution."""
    config = train_config("approx=full", "sampling.temperature=0.7")
    policy, groups = off_policy(config)
    log_pi_NV = make.trained_log_probs(policy, [g.prompt for g in groups], [g.completions for g in groups], 0.7)
    (stats,) = make_learner(policy, with_budget(config, 10**6)).update(groups).stats
    lengths, samples = response_lengths(groups), completions(groups)
    order = sorted(range(8), key=lambda i: -lengths[i])
    ends = torch.tensor(lengths).cumsum(0)
    log_pi_NV = log_pi_NV[torch.cat([torch.arange(ends[i] - lengths[i], ends[i]) for i in order])]
    token_N = torch.cat([samples[i].token_ids_T for i in order])
    mu_NV = torch.cat([samples[i].mu.full_log_probs() for i in order]).exp()
    logp_N = log_pi_NV.gather(-1, token_N[:, None])[:, 0]
    logp_mu_N = torch.cat([samples[i].mu.logp_N for i in order])
    assert torch.equal(stats.token_N, token_N)
    close = dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stats.pi_N, logp_N.exp(), **close)
    torch.testing.assert_close(stats.mu_N, logp_mu_N.exp(), **close)
    torch.testing.assert_close(stats.log_ratio_N, logp_N - logp_mu_N, **close)
    torch.testing.assert_close(stats.entropy_N, -(log_pi_NV.exp() * log_pi_NV).sum(-1), **close)
    torch.testing.assert_close(stats.divergence_N, 0.5 * (log_pi_NV.exp() - mu_NV).abs().sum(-1), **close)


@pytest.mark.parametrize(
    ("aggregation", "divisor"), [("token_mean", "tokens"), ("seq_mean_token_sum", "sequences x length")]
)
def test_the_divisor_is_that_of_the_whole_batch(train_config, aggregation, divisor):
    config = train_config(f"aggregation={aggregation}", UNCLIPPED, "hardware.tokens_per_micro_batch=40")
    policy, groups = off_policy(config)
    expected = dense_gradient(policy, config, groups)  # divided by the number of tokens
    tokens = sum(response_lengths(groups))
    found, _ = gradient(make_learner(policy, config), groups)
    factor = 1.0 if divisor == "tokens" else tokens / (8 * config.sampling.max_new_tokens)
    assert_equal_gradients(found, [g * factor for g in expected])


def test_the_adapter_is_float32_on_a_base_of_lower_precision(train_config):
    config = train_config(UNCLIPPED)
    policy, groups = off_policy(config)
    expected, _ = gradient(make_learner(policy, config), groups)
    lower = train_config("hardware.dtype=bfloat16", UNCLIPPED)
    policy, _ = off_policy(lower)
    assert policy.head.weight_VH.dtype == torch.bfloat16
    found, _ = gradient(make_learner(policy, lower), groups)
    assert {p.dtype for p in policy.parameters} == {g.dtype for g in found} == {torch.float32}
    both = (torch.cat([g.flatten() for g in gradient]) for gradient in (found, expected))
    assert 0.99 < torch.nn.functional.cosine_similarity(*both, dim=0) < 0.999999
