"""The in-process engine: what it reports is what training computes."""

import make
import pytest
import tiny
import torch
from engines import ROUNDING, TEMPERATURE, generate, opened, sampling, trained

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.policy import loading
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalRollout

architectures = pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
merging = pytest.mark.parametrize("merge", [True, False], ids=["merged", "beside"])


@architectures
@merging
@pytest.mark.parametrize("texts", [make.MIXED, ("3+4=", "a - ")], ids=["padded", "equal lengths"])
def test_log_probs_are_those_of_the_training_forward(train_config, architecture, merge, texts):
    policy = make.policy(train_config(model=architecture))
    prompts = make.prompts(policy, texts)
    with opened(policy, merge=merge) as engine:
        fresh = in_order(engine.generate(prompts, 3, sampling(), 0, seed=3))
        torch.testing.assert_close(make.reported(fresh).logp_N, trained(policy, prompts, fresh), **ROUNDING)

        make.move_adapter(policy, 0.1)
        engine.sync(1)
        moved = in_order(engine.generate(prompts, 3, sampling(), 0, seed=3))
    mu_N = make.reported(moved).logp_N
    torch.testing.assert_close(mu_N, trained(policy, prompts, moved), **ROUNDING)
    with policy.without_adapter():
        assert (trained(policy, prompts, moved) - mu_N).abs().max() > 0.05, "the adapter made no difference"


@architectures
def test_top_k_is_that_of_the_training_forward(train_config, architecture):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    prompts = make.prompts(policy)
    completions = generate(policy, prompts, 2, sampling(), 5)
    mu = make.reported(completions)
    log_pi_NV = make.trained_log_probs(policy, prompts, completions, TEMPERATURE)
    best = log_pi_NV.topk(5, dim=-1)
    assert mu.topk_ids_NK.shape == (len(mu.logp_N), 5)
    torch.testing.assert_close(mu.topk_logp_NK, best.values, **ROUNDING)
    torch.testing.assert_close(log_pi_NV.gather(-1, mu.topk_ids_NK), mu.topk_logp_NK, **ROUNDING)
    clear_N = (best.values[:, :-1] - best.values[:, 1:]).amin(-1) > 1e-3  # no ties that rounding could turn round
    assert clear_N.float().mean() > 0.9
    assert torch.equal(mu.topk_ids_NK[clear_N], best.indices[clear_N])


def test_a_list_longer_than_the_vocabulary_is_the_whole_vocabulary(train_config):
    policy = make.policy(train_config())
    prompts = make.prompts(policy)
    completions = generate(policy, prompts, 2, sampling(), 500)
    mu = make.reported(completions)
    assert torch.equal(mu.topk_ids_NK.sort(-1).values, torch.arange(96).expand(len(mu.logp_N), -1))
    rebuilt_NV = torch.empty(len(mu.logp_N), 96).scatter(-1, mu.topk_ids_NK, mu.topk_logp_NK)
    expected_NV = make.trained_log_probs(policy, prompts, completions, TEMPERATURE)
    torch.testing.assert_close(rebuilt_NV, expected_NV, **ROUNDING)


@architectures
@merging
def test_whole_vocabulary_reports_rebuild_the_distribution(train_config, architecture, merge):
    """Also after the engine has been closed."""
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    prompts = make.prompts(policy)
    completions = generate(policy, prompts, 2, sampling(), WHOLE_VOCABULARY, merge=merge)
    mu = make.reported(completions)
    expected_NV = make.trained_log_probs(policy, prompts, completions, TEMPERATURE)
    torch.testing.assert_close(mu.full_log_probs(), expected_NV, **ROUNDING)
    token_N = torch.cat([c.token_ids_T for c in make.flat(completions)])
    torch.testing.assert_close(mu.full_log_probs().gather(-1, token_N[:, None])[:, 0], mu.logp_N, **ROUNDING)


@pytest.mark.parametrize("concurrent_sequences", [1, 4, 7])
def test_reports_are_right_in_every_sub_batch(train_config, concurrent_sequences):
    """Also where a sub-batch would be smaller than one prompt's samples: a group is never split."""
    policy = make.policy(train_config(model="gemma2"), adapter_scale=0.1)
    prompts = make.prompts(policy)
    completions = generate(policy, prompts, 3, sampling(), seed=5, concurrent_sequences=concurrent_sequences)
    assert [len(row) for row in completions] == [3, 3, 3, 3]
    torch.testing.assert_close(make.reported(completions).logp_N, trained(policy, prompts, completions), **ROUNDING)


@architectures
def test_a_sampling_copy_in_bfloat16_differs_a_little(train_config, architecture):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    prompts = make.prompts(policy)
    before = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    # It warns on a processor without bfloat16.
    with LocalRollout("merged", "bfloat16", 512, 1024).load(policy, lambda _: None) as engine:
        engine.sync(0)
        completions = in_order(engine.generate(prompts, 4, sampling(), 0, seed=3))
        assert {p.dtype for p in engine.copy.model.parameters()} == {torch.bfloat16}
    mu_N = make.reported(completions).logp_N
    mismatch_N = (mu_N.exp() - trained(policy, prompts, completions).exp()).abs()
    assert 1e-5 < mismatch_N.mean() < 0.05
    assert mu_N.dtype == torch.float32
    for name, parameter in policy.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name]), f"the sampling copy changed the policy's {name}"


def test_a_lower_precision_of_training_is_sampled_with_the_same_rounding(train_config, monkeypatch):
    """The policy's own model samples under autocast as it trains; else the adapter would run in float32."""
    monkeypatch.setattr(loading, "emulates_bfloat16", lambda *_: False)  # no warning, whatever this processor has
    policy = make.policy(train_config("hardware.dtype=bfloat16"), adapter_scale=0.1)
    prompts = make.prompts(policy, ("12+34=", "abcdef"))
    completions = generate(policy, prompts, 4, sampling(1), merge=False)
    torch.testing.assert_close(make.reported(completions).logp_N, trained(policy, prompts, completions), **ROUNDING)
    assert {p.dtype for p in policy.parameters} == {torch.float32}
    assert policy.head.weight_VH.dtype == torch.bfloat16


def test_temperature_zero_takes_the_likeliest_token_and_reports_temperature_one(train_config):
    policy = make.policy(train_config(), adapter_scale=0.1)
    prompts = make.prompts(policy)
    completions = generate(policy, prompts, 2, sampling(temperature=0))
    log_pi_NV = make.trained_log_probs(policy, prompts, completions, temperature=1.0)
    assert torch.equal(torch.cat([c.token_ids_T for c in make.flat(completions)]), log_pi_NV.argmax(-1))
    torch.testing.assert_close(make.reported(completions).logp_N, log_pi_NV.amax(-1), **ROUNDING)
    assert make.tokens(completions)[::2] == make.tokens(completions)[1::2]


def test_truncation_keeps_to_the_list_and_leaves_the_report_untruncated(train_config):
    policy = make.policy(train_config())
    prompts = make.prompts(policy)
    completions = generate(policy, prompts, 8, sampling(top_k=3))
    log_pi_NV = make.trained_log_probs(policy, prompts, completions, TEMPERATURE)
    token_N = torch.cat([c.token_ids_T for c in make.flat(completions)])
    assert (log_pi_NV.topk(3, dim=-1).indices == token_N[:, None]).any(-1).all()
    logp_N = log_pi_NV.gather(-1, token_N[:, None])[:, 0]
    torch.testing.assert_close(make.reported(completions).logp_N, logp_N, **ROUNDING)


def test_adapter_dropout_is_off_while_sampling_and_on_again_after(train_config):
    policy = make.policy(train_config("adapter.dropout=0.5"), adapter_scale=0.3)
    prompts = make.prompts(policy)
    assert policy.model.training
    completions = generate(policy, prompts, 2, sampling(), merge=False)
    assert policy.model.training
    policy.model.eval()
    torch.testing.assert_close(make.reported(completions).logp_N, trained(policy, prompts, completions), **ROUNDING)


def test_a_model_without_adapter_samples_as_it_is(train_config, tiny_models):
    config = train_config()
    plain, fresh = make.plain_policy(tiny_models["llama3"], config), make.policy(config)
    prompts = make.prompts(plain)
    completions = generate(plain, prompts, 2, sampling())
    torch.testing.assert_close(make.reported(completions).logp_N, trained(plain, prompts, completions), **ROUNDING)
    assert make.tokens(generate(fresh, prompts, 2, sampling())) == make.tokens(completions)
