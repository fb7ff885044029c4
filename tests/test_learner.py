"""The update: its gradient against a dense implementation, and everything that must not change it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import make
import pytest
import torch
from torch import Tensor

from dppo_cli.algorithm.divergence import TotalVariation
from dppo_cli.algorithm.objective import Objective, TokenLoss, Tokens
from dppo_cli.conf_tree import groups
from dppo_cli.config import TrainConfig
from dppo_cli.errors import NumericalError
from dppo_cli.learner import Learner, UpdateResult, lr_factor
from dppo_cli.policy.policy import Policy
from dppo_cli.sections import AdamW
from dppo_cli.telemetry.trust_region import TokenStats
from dppo_cli.types import Completion, PolicyReport, Sample

ADVANTAGES = (1.0, -0.5, 0.25, -1.5, 0.75, 2.0, -1.0, 0.5)
UNCLIPPED = "optim.max_grad_norm=null"
MASKING = ("divergence.delta_low=0.01", "divergence.delta_high=0.01")


def rollout(of: Policy, config: TrainConfig, advantages: Sequence[float] = ADVANTAGES) -> list[Sample]:
    """Samples of the policy as it is, of different lengths, with the given advantages."""
    engine = config.rollout.load(of)
    completions = engine.generate(make.prompts(of), 2, config.sampling, config.approx.num_logprobs, seed=5)
    return make.samples(completions, advantages)


ROLLOUTS: dict[str, list[Completion]] = {}


def off_policy(config: TrainConfig, advantages: Sequence[float] = ADVANTAGES) -> tuple[Policy, list[Sample]]:
    """A policy, and samples that it took before its adapter moved. Equal calls give equal weights and samples."""
    policy = make.policy(config, adapter_scale=0.05, seed=1)
    hardware = (config.hardware.dtype, config.hardware.gradient_checkpointing)
    key = repr((config.model, config.adapter, hardware, config.sampling, config.approx, config.rollout))
    if key not in ROLLOUTS:
        ROLLOUTS[key] = [s.completion for s in rollout(policy, config)]
    make.move_adapter(policy, 0.08, seed=2)
    return policy, make.samples(ROLLOUTS[key], advantages)


def gradient(learner: Learner, samples: Sequence[Sample]) -> tuple[list[Tensor], UpdateResult]:
    """The gradient that the optimizer sees in one update."""
    seen: list[Tensor] = []

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.extend(p.grad.clone() for p in learner.policy.parameters)

    hook = learner.optimizer.register_step_pre_hook(look)
    result = learner.update(samples)
    hook.remove()
    return seen, result


def dense_gradient(policy: Policy, config: TrainConfig, samples: Sequence[Sample]) -> list[Tensor]:
    """DPPO on the binary total variation, with full logits and plain autograd, a sequence at a time."""
    count = sum(int(s.completion.sampled_T.sum()) for s in samples)
    delta, cap = config.divergence, config.objective.ratio_cap
    total = torch.zeros(())

    def log_probs(sample: Sample) -> Tensor:
        prompt, response = list(sample.completion.prompt.token_ids), sample.completion.token_ids_T
        logits_LV = policy.model(input_ids=torch.tensor([prompt + response.tolist()])).logits[0]
        log_pi_TV = (logits_LV[len(prompt) - 1 : -1] / config.sampling.temperature).log_softmax(-1)
        return log_pi_TV.gather(-1, response[:, None])[:, 0][sample.completion.sampled_T]

    for sample in samples:
        mu_N, pi_N = sample.completion.mu.logp_N, log_probs(sample)
        ratio_N = (pi_N.detach() - mu_N).exp()
        tv_N = (pi_N.detach().exp() - mu_N.exp()).abs()
        if sample.advantage > 0:
            keep_N = ~((ratio_N > 1) & (tv_N > delta.delta_high))
        else:
            keep_N = ~((ratio_N < 1) & (tv_N > delta.delta_low))
        weight_N = keep_N * (ratio_N.clamp(max=cap) if cap else ratio_N) * sample.advantage
        total = total - (weight_N * pi_N).sum() / count
        if config.kl_to_reference:
            with torch.no_grad(), policy.without_adapter():
                ref_N = log_probs(sample)
            # E_pi[(log pi - log ref) grad log pi] by importance weights: the gradient of KL(pi || ref).
            total = total + config.kl_to_reference * (ratio_N * (pi_N.detach() - ref_N) * pi_N).sum() / count
    policy.model.zero_grad()
    total.backward()
    found = [p.grad.clone() for p in policy.parameters]
    policy.model.zero_grad()
    return found


def assert_equal_gradients(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 5e-6) -> None:
    """To `tolerance`, relative to the largest entry of each."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        scale = float(b.abs().max())
        assert scale > 0
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=tolerance)


def assert_identical(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def masked(result: UpdateResult) -> int:
    return sum(int((~part.keep_N).sum()) for part in result.stats)


@pytest.mark.parametrize("model", ["llama3", "gpt2", "gemma2", "cohere2"])
@pytest.mark.parametrize("kl", [0.0, 0.5])
def test_the_gradient_is_that_of_a_dense_implementation(train_config, model, kl):
    config = train_config(UNCLIPPED, "sampling.temperature=0.7", f"kl_to_reference={kl}", model=model)
    config = replace(config, hardware=replace(config.hardware, head_chunk=7, tokens_per_micro_batch=25))
    delta = 0.001 if model == "cohere2" else 0.01  # Cohere's small scale leaves it nearly uniform
    config = replace(config, divergence=TotalVariation(delta_low=delta, delta_high=2 * delta))
    policy, samples = off_policy(config)
    expected = dense_gradient(policy, config, samples)
    found, result = gradient(Learner(policy, config), samples)
    tokens = sum(len(s.completion.token_ids_T) for s in samples)
    assert 0.1 * tokens < masked(result) < 0.9 * tokens
    assert len(result.stats) > 2, "several micro-batches, several chunks"
    assert_equal_gradients(found, expected)
    norm = math.sqrt(sum(float(g.square().sum()) for g in expected))
    assert result.gradient_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("objective", ["dppo", "gspo", "ipo"])
def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(train_config, objective):
    config = train_config(f"objective={objective}", *MASKING, UNCLIPPED, "kl_to_reference=0.1", "approx=topk")
    gradients, places, counts = [], [], []
    for budget, chunk in ((10**6, 10**6), (1, 256), (64, 3)):
        policy, samples = off_policy(config)
        cut = replace(config, hardware=replace(config.hardware, tokens_per_micro_batch=budget, head_chunk=chunk))
        found, result = gradient(Learner(policy, cut), samples)
        gradients.append(found)
        places.append((result.places, result.padded_places))
        counts.append(len(result.stats))
    assert_equal_gradients(gradients[1], gradients[0])
    assert_equal_gradients(gradients[2], gradients[0])
    responses = [len(s.completion.token_ids_T) for s in samples]
    prompts = [len(s.completion.prompt.token_ids) for s in samples[::2]]
    whole = 4 * max(prompts) + 8 * max(responses)
    assert places[0] == (whole, whole - sum(prompts) - sum(responses)), "both samples of a prompt share it"
    assert places[1] == (sum(prompts) + sum(responses), 0), "however the responses are cut, a prompt runs once"
    assert counts[:2] == [1, 8]
    assert 1 < counts[2] < 8


def test_what_stands_in_the_padding_does_not_matter(train_config):
    config = train_config(UNCLIPPED)
    policy, samples = off_policy(config)
    first, result = gradient(Learner(policy, config), samples)
    assert result.padded_places > 0
    policy, _ = off_policy(config)
    second, _ = gradient(Learner(replace(policy, pad_id=40), config), samples)
    assert_identical(second, first)


@dataclass(frozen=True)
class Everything:
    """An objective that asks for tokens without advantage, too, although they give nothing."""

    inner: Objective

    needs_all_tokens = True

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return self.inner(tokens)


@pytest.mark.parametrize("objective", ["dppo", "ppo", "gspo", "drpo", "pg_is"])
@pytest.mark.parametrize("budget", [10**6, 64])
def test_skipping_samples_without_advantage_leaves_the_gradient_bit_for_bit(train_config, objective, budget):
    config = train_config(f"objective={objective}", *MASKING, UNCLIPPED, f"hardware.tokens_per_micro_batch={budget}")
    advantages = (0.0, -0.5, 0.0, -1.5, 0.75, 0.0, -1.0, 0.0)
    policy, samples = off_policy(config, advantages)
    without, skipping = gradient(Learner(policy, config), samples)
    policy, samples = off_policy(config, advantages)
    everything = replace(config, objective=Everything(config.objective))
    with_all, running = gradient(Learner(policy, everything), samples)
    assert (skipping.skipped_sequences, running.skipped_sequences) == (4, 0)
    assert skipping.sequences == running.sequences == 8
    assert skipping.places < running.places
    assert_identical(without, with_all)
    assert any(g.abs().max() > 0 for g in without)


def test_a_batch_without_any_advantage_changes_nothing(train_config):
    config = train_config("optim.weight_decay=0.0")
    policy, samples = off_policy(config, [0.0] * 8)
    before = [p.detach().clone() for p in policy.parameters]
    result = Learner(policy, config).update(samples)
    assert_identical([p.detach() for p in policy.parameters], before)
    assert (result.stats, result.gradient_norm, result.skipped_sequences, result.places) == ([], 0.0, 8, 0)


@pytest.mark.parametrize("override", ["objective=ipo", "kl_to_reference=0.1"])
def test_terms_without_advantage_train_every_sample(train_config, override):
    config = train_config(override, UNCLIPPED)
    policy, samples = off_policy(config, [0.0] * 8)
    found, result = gradient(Learner(policy, config), samples)
    assert result.skipped_sequences == 0
    assert all(g.abs().max() > 0 for g in found)


CHOICES = {name: groups()[name] for name in ("objective", "divergence", "approx")}


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
    combinations = list(itertools.product(*(choices.values() for choices in found.values()), ("rollout", "recompute")))
    assert len(combinations) >= 10 * 2 * 3 * 2
    for objective, divergence, approx, anchor in combinations:
        config = replace(base, objective=objective, divergence=divergence, approx=approx, anchor=anchor)
        policy, samples = off_policy(config)
        learner = Learner(policy, config)
        if anchor == "recompute":
            samples = learner.anchored(samples)
        before = [p.detach().clone() for p in policy.parameters]
        result = learner.update(samples)
        seen = TokenStats.cat(result.stats)
        assert math.isfinite(result.gradient_norm)
        assert (result.gradient_norm > 0) == bool(seen.keep_N.any() or objective.needs_all_tokens)
        assert torch.isfinite(seen.divergence_N).all()
        assert (seen.divergence_N.max() > 0.01) == (anchor == "rollout")
        assert all(torch.isfinite(p).all() for p in policy.parameters)
        assert any(not torch.equal(p, b) for p, b in zip(policy.parameters, before, strict=True)) == (
            result.gradient_norm > 0
        )


@pytest.mark.parametrize("approx", ["binary", "topk", "full"])
def test_recomputing_an_anchor_that_agrees_gives_the_same_update(train_config, approx):
    config = train_config(f"approx={approx}", "approx.k=5" if approx == "topk" else "steps=4", UNCLIPPED)
    policy = make.policy(config, adapter_scale=0.05)
    samples = rollout(policy, config)
    anchored = Learner(policy, config).anchored(samples)
    for sample, again in zip(samples, anchored, strict=True):
        assert again.completion is sample.completion
        torch.testing.assert_close(again.anchor.logp_N, sample.anchor.logp_N, rtol=1e-5, atol=1e-5)
        if approx == "topk":
            assert again.anchor.topk_ids_NK.shape == sample.anchor.topk_ids_NK.shape
            torch.testing.assert_close(again.anchor.topk_logp_NK, sample.anchor.topk_logp_NK, rtol=1e-5, atol=1e-5)
        if approx == "full":
            torch.testing.assert_close(
                again.anchor.full_log_probs(), sample.anchor.full_log_probs(), rtol=1e-5, atol=2e-5
            )
    first, _ = gradient(Learner(policy, config), samples)
    policy = make.policy(config, adapter_scale=0.05)
    second, _ = gradient(Learner(policy, config), anchored)
    assert_equal_gradients(second, first)


@pytest.mark.parametrize("approx", ["binary", "topk", "full"])
def test_the_trust_region_is_centred_on_the_anchor_and_the_weight_on_mu(train_config, approx):
    config = train_config(f"approx={approx}", *MASKING, UNCLIPPED, "objective.ratio_cap=null")
    policy, samples = off_policy(config)
    learner = Learner(policy, config)
    anchored = learner.anchored(samples)
    around_mu, found = gradient(learner, samples)
    assert masked(found) > 5

    policy, _ = off_policy(config)
    around_pi, found = gradient(Learner(policy, config), anchored)
    assert masked(found) == 0, "pi has not left itself"
    assert max(float(part.divergence_N.max()) for part in found.stats) < 1e-5
    policy, _ = off_policy(config)
    unmasked = replace(config, divergence=replace(config.divergence, delta_low=1.0, delta_high=1.0))
    weighted_by_mu = dense_gradient(policy, unmasked, samples)
    assert_equal_gradients(around_pi, weighted_by_mu)
    assert any((a - b).abs().max() > 1e-3 * b.abs().max() for a, b in zip(around_mu, around_pi, strict=True))


def test_a_fresh_adapter_is_its_own_reference(train_config):
    with_term = train_config("kl_to_reference=0.5", UNCLIPPED)
    without_term = replace(with_term, kl_to_reference=0.0)
    gradients, results = [], []
    for config in (with_term, without_term):
        policy = make.policy(config)
        found, result = gradient(Learner(policy, config), rollout(policy, config))
        gradients.append(found)
        results.append(result)
    assert_identical(*gradients)
    assert all(part.reference_kl_N.abs().max() == 0 for part in results[0].stats)


def test_the_reference_term_changes_the_gradient_of_a_moved_adapter(train_config):
    """By how much: see the dense implementation above. The figure is log pi/ref of the sampled tokens."""
    config = train_config("hardware.tokens_per_micro_batch=1000000", UNCLIPPED)
    policy, samples = off_policy(config)
    samples.sort(key=lambda s: -len(s.completion.token_ids_T))
    token_N = torch.cat([s.completion.token_ids_T for s in samples])
    log_pi_NV = make.trained_log_probs(policy, [s.completion for s in samples], 1.0)
    with policy.without_adapter():
        log_ref_NV = make.trained_log_probs(policy, [s.completion for s in samples], 1.0)
    expected_N = (log_pi_NV - log_ref_NV).gather(-1, token_N[:, None])[:, 0]
    without, result = gradient(Learner(policy, config), samples)
    assert all(part.reference_kl_N.abs().max() == 0 for part in result.stats)
    policy, _ = off_policy(config)
    with_term, result = gradient(Learner(policy, replace(config, kl_to_reference=0.5)), samples)
    torch.testing.assert_close(TokenStats.cat(result.stats).reference_kl_N, expected_N, rtol=1e-4, atol=1e-5)
    assert any((a - b).abs().max() > 0.05 * a.abs().max() for a, b in zip(without, with_term, strict=True))


def test_a_large_gradient_is_scaled_to_the_limit(train_config):
    whole, result = gradient_of(train_config(UNCLIPPED))
    norm = result.gradient_norm
    clipped, clipped_result = gradient_of(train_config(f"optim.max_grad_norm={norm / 4}"))
    assert clipped_result.gradient_norm == pytest.approx(norm), "the norm before clipping is reported"
    assert_equal_gradients([4 * g for g in clipped], whole, 1e-5)
    untouched, _ = gradient_of(train_config(f"optim.max_grad_norm={norm * 4}"))
    assert_identical(untouched, whole)


def gradient_of(config: TrainConfig) -> tuple[list[Tensor], UpdateResult]:
    policy, samples = off_policy(config)
    return gradient(Learner(policy, config), samples)


def test_the_first_step_is_adams(train_config):
    """Adam's first step is lr x sign(gradient) where eps is small; weight decay is decoupled."""
    config = train_config(UNCLIPPED, "optim.lr=0.01", "optim.weight_decay=0.1", "optim.eps=1e-12")
    policy, samples = off_policy(config)
    before = [p.detach().clone() for p in policy.parameters]
    found, _ = gradient(Learner(policy, config), samples)
    for parameter, old, g in zip(policy.parameters, before, found, strict=True):
        clear = g.abs() > 1e-6
        expected = old * (1 - 0.01 * 0.1) - 0.01 * g.sign()
        torch.testing.assert_close(parameter[clear], expected[clear], rtol=1e-5, atol=1e-6)


def test_the_second_update_starts_from_an_empty_gradient_and_remembers_the_moments(train_config):
    config = train_config(UNCLIPPED, "optim.lr=0.01", "optim.betas=[0.5,0.8]", "optim.eps=1e-6")
    policy, samples = off_policy(config)
    learner = Learner(policy, config)
    first, _ = gradient(learner, samples)
    before = [p.detach().clone() for p in policy.parameters]
    expected = dense_gradient(policy, config, samples)
    second, _ = gradient(learner, samples)
    assert_equal_gradients(second, expected)
    for parameter, old, g1, g2 in zip(policy.parameters, before, first, second, strict=True):
        mean = (0.5 * 0.5 * g1 + 0.5 * g2) / (1 - 0.5**2)
        square = (0.8 * 0.2 * g1**2 + 0.2 * g2**2) / (1 - 0.8**2)
        torch.testing.assert_close(parameter.detach(), old - 0.01 * mean / (square.sqrt() + 1e-6), rtol=1e-5, atol=1e-6)


def adamw(warmup_updates: int, schedule: str) -> AdamW:
    return AdamW(1e-3, [0.9, 0.999], 1e-8, 0.0, None, warmup_updates, schedule)


def test_learning_rate_factors():
    constant = [lr_factor(i, 10, adamw(4, "constant")) for i in range(8)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [lr_factor(i, 10, adamw(0, "constant")) for i in range(3)] == [1.0, 1.0, 1.0]
    cosine = [lr_factor(i, 10, adamw(2, "cosine")) for i in range(12)]
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)] + [0.0]
    assert cosine == pytest.approx(expected, abs=1e-12)
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.5)
    assert cosine[10] == pytest.approx(0.0, abs=1e-12)
    assert lr_factor(3, 2, adamw(3, "cosine")) == pytest.approx(1.0), "warm-up longer than the run"


def test_the_learning_rate_that_is_reported_is_the_one_that_was_used(train_config):
    config = train_config("optim.lr=0.01", "optim.warmup_updates=2", "optim.schedule=cosine", "steps=4")
    policy, samples = off_policy(config)
    learner, used = Learner(policy, config), []
    learner.optimizer.register_step_pre_hook(lambda o, args, kwargs: used.append(o.param_groups[0]["lr"]))
    reported = [learner.update(samples).lr for _ in range(4)]
    assert reported == used == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_the_schedule_counts_updates_not_steps(train_config):
    config = train_config(
        "batch.prompts_per_step=4", "batch.prompts_per_update=2", "batch.epochs=2", "steps=1", "optim.schedule=cosine"
    )
    policy, samples = off_policy(config)
    learner = Learner(policy, config)
    factors = [learner.update(samples).lr / config.optim.lr for _ in range(4)]
    assert factors == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])


@pytest.mark.parametrize("limit", ["null", "1.0"])
def test_a_gradient_that_is_not_finite_changes_no_weight(train_config, limit):
    config = train_config("objective=pg_is", f"optim.max_grad_norm={limit}")
    policy, samples = off_policy(config)
    broken = samples[0].completion
    broken = replace(broken, mu=replace(broken.mu, logp_N=torch.full_like(broken.mu.logp_N, -1000.0)))
    samples[0] = Sample(broken, 0.0, 1.0, broken.mu)
    before = [p.detach().clone() for p in policy.parameters]
    learner = Learner(policy, config)
    with pytest.raises(NumericalError, match="nothing was updated"):
        learner.update(samples)
    assert_identical([p.detach() for p in policy.parameters], before)
    assert not learner.optimizer.state


def test_a_log_prob_that_is_nan_is_refused(train_config):
    config = train_config()
    policy, samples = off_policy(config)
    logp_N = samples[3].completion.mu.logp_N.clone()
    logp_N[1] = torch.nan
    broken = replace(samples[3].completion, mu=PolicyReport(logp_N))
    samples[3] = Sample(broken, 0.0, 1.0, broken.mu)
    before = [p.detach().clone() for p in policy.parameters]
    with pytest.raises(NumericalError, match="divergence of 1 of"):
        Learner(policy, config).update(samples)
    assert_identical([p.detach() for p in policy.parameters], before)


def test_the_adapter_is_float32_on_a_base_of_lower_precision(train_config):
    config = train_config(UNCLIPPED)
    policy, samples = off_policy(config)
    expected, _ = gradient(Learner(policy, config), samples)
    lower = train_config("hardware.dtype=bfloat16", UNCLIPPED)
    policy, _ = off_policy(lower)
    assert policy.head.weight_VH.dtype == torch.bfloat16
    found, _ = gradient(Learner(policy, lower), samples)
    assert {p.dtype for p in policy.parameters} == {g.dtype for g in found} == {torch.float32}
    both = (torch.cat([g.flatten() for g in gradient]) for gradient in (found, expected))
    assert 0.99 < torch.nn.functional.cosine_similarity(*both, dim=0) < 0.999999


@pytest.mark.parametrize("model", ["llama3", "gpt2"])
def test_gradient_checkpointing_gives_the_same_gradient(train_config, model):
    plain = train_config(UNCLIPPED, "kl_to_reference=0.1", model=model)
    recomputing = replace(plain, hardware=replace(plain.hardware, gradient_checkpointing=True))
    gradients, calls = [], []
    for config in (plain, recomputing):
        policy, samples = off_policy(config)
        layer = next(m for name, m in policy.model.named_modules() if name.endswith(".0.mlp"))
        calls.append(0)

        def count(*_: Any) -> None:
            calls[-1] += 1

        hook = layer.register_forward_pre_hook(count)
        gradients.append(gradient(Learner(policy, config), samples)[0])
        hook.remove()
    # Prompts and responses, for pi and for the reference, and pi's prompts again going back; whole sequences for both,
    # and pi's again going back.
    assert calls == [5, 3]
    assert_equal_gradients(gradients[1], gradients[0])


def test_tokens_that_the_model_did_not_sample_have_no_loss(train_config):
    """They stand in the sequence, and later tokens see them; loss, divisor and figures leave them out."""
    config = train_config(*MASKING, UNCLIPPED)
    policy, samples = off_policy(config)
    part = []
    for i, sample in enumerate(samples):
        completion = sample.completion
        sampled_T = torch.ones_like(completion.sampled_T)
        sampled_T[1 + i % 3 : 3 + i % 3] = False
        mu = completion.mu[sampled_T]
        part.append(Sample(replace(completion, sampled_T=sampled_T, mu=mu), 0.0, sample.advantage, mu))
    expected = dense_gradient(policy, config, part)
    found, result = gradient(Learner(policy, config), part)
    assert_equal_gradients(found, expected)
    seen = torch.cat([stats.token_N for stats in result.stats])
    own = torch.cat([s.completion.token_ids_T[s.completion.sampled_T] for s in part])
    assert sorted(seen.tolist()) == sorted(own.tolist())
    assert len(own) < sum(len(s.completion.token_ids_T) for s in part)


def test_figures_of_an_update(train_config):
    """What the statistics hold, token by token, against the dense distribution."""
    config = train_config("approx=full", "sampling.temperature=0.7")
    policy, samples = off_policy(config)
    log_pi_NV = make.trained_log_probs(policy, [s.completion for s in samples], 0.7)
    learner = Learner(policy, replace(config, hardware=replace(config.hardware, tokens_per_micro_batch=10**6)))
    (stats,) = learner.update(samples).stats
    order = sorted(range(8), key=lambda i: -len(samples[i].completion.token_ids_T))
    ends = torch.tensor([len(s.completion.token_ids_T) for s in samples]).cumsum(0)
    rows = torch.cat([torch.arange(ends[i] - len(samples[i].completion.token_ids_T), ends[i]) for i in order])
    log_pi_NV = log_pi_NV[rows]
    token_N = torch.cat([samples[i].completion.token_ids_T for i in order])
    mu_NV = torch.cat([samples[i].completion.mu.full_log_probs() for i in order]).exp()
    logp_N = log_pi_NV.gather(-1, token_N[:, None])[:, 0]
    logp_mu_N = torch.cat([samples[i].completion.mu.logp_N for i in order])
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
    policy, samples = off_policy(config)
    expected = dense_gradient(policy, config, samples)  # divided by the number of tokens
    tokens = sum(len(s.completion.token_ids_T) for s in samples)
    found, _ = gradient(Learner(policy, config), samples)
    factor = 1.0 if divisor == "tokens" else tokens / (8 * config.sampling.max_new_tokens)
    assert_equal_gradients(found, [g * factor for g in expected])


def test_skipped_samples_count_in_the_divisor(train_config):
    """A = 0 is a zero in the mean, not an absence."""
    config = train_config(UNCLIPPED)
    policy, samples = off_policy(config, (1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
    expected = dense_gradient(policy, config, samples)
    found, _ = gradient(Learner(policy, config), samples)
    assert_equal_gradients(found, expected)
