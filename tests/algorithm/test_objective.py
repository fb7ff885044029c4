"""Objectives that mask or weigh each token by itself: DPPO, the ratio clip of PPO, the plain policy gradient."""

import math
from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY, gradient, make_tokens, naive_gradient, ppo_loss, same, token_batches
from torch import Tensor

from dppo_cli.algorithm.objective import DPPO, MinimalMask, PolicyGradient, RatioClip, Tokens

# DPPO ----------------------------------------------------------------------------------------------------------------


def test_dppo_by_hand():
    tokens = make_tokens(
        mu=[0.5, 0.5, 0.1, 0.1, 0.4],
        pi=[0.6, 0.6, 0.8, 0.02, 0.2],
        advantage=[2.0, 2.0, 2.0, -1.0, -1.0],
        divergence=[0.1, 0.2, 0.1, 0.16, 0.15],
    )
    # In order: kept at r = 1.2; masked; capped from r = 8; masked; kept at r = 0.5 with D at its threshold.
    loss_N, keep_N = DPPO(5.0)(tokens)
    assert keep_N.tolist() == [True, False, True, False, True]
    same(gradient(DPPO(5.0), tokens), [-2.4, 0.0, -10.0, 0.0, 0.5])
    same(gradient(DPPO(None), tokens), [-2.4, 0.0, -16.0, 0.0, 0.5])
    expected = [-2.4 * math.log(0.6), 0.0, -10.0 * math.log(0.8), 0.0, 0.5 * math.log(0.2)]
    assert loss_N.tolist() == pytest.approx(expected, abs=1e-9)


@PROPERTY
@given(tokens=token_batches(), cap=st.sampled_from([None, 1.0, 1.5, 5.0]))
def test_dppo_gradient_is_mask_times_capped_ratio_times_advantage(tokens: Tokens, cap: float | None):
    divergence = tokens.divergence_N.tolist()

    def loss(pi: Tensor, mu: Tensor, advantage: Tensor, i: int) -> Tensor:
        kept = reference.keep(advantage.item(), mu.item(), pi.item(), divergence[i], *reference.DELTA)
        weight = kept * min((pi / mu).item(), cap or math.inf) * advantage.item()
        return -weight * pi.log()

    same(gradient(DPPO(cap), tokens), naive_gradient(loss, tokens))


@PROPERTY
@given(tokens=token_batches())
def test_dppo_without_cap_is_the_gradient_of_the_masked_surrogate(tokens: Tokens):
    """Maximise M r A with r differentiable: the same gradient as -sg(M r A) log pi."""
    kept = DPPO(None)(tokens).keep_N.tolist()
    same(gradient(DPPO(None), tokens), naive_gradient(lambda pi, mu, a, i: -kept[i] * pi / mu * a, tokens))


@pytest.mark.parametrize(
    "objective",
    [DPPO(2.0), PolicyGradient(2.0), RatioClip(9.0, 9.0, 2.0)],
    ids=lambda objective: type(objective).__name__,
)
def test_edge_9_the_cap_bounds_the_weight_and_does_not_kill_the_gradient(objective):
    tokens = make_tokens([0.1], [0.4], [1.5])
    same(gradient(objective, tokens), [-3.0])


@PROPERTY
@given(tokens=token_batches())
def test_weights_are_detached(tokens: Tokens):
    """A second derivative is zero: the loss is linear in log pi."""
    for objective in (DPPO(None), DPPO(2.0), PolicyGradient(None), RatioClip(0.2, 0.2, None), MinimalMask(0.5, None)):
        loss_N = objective(tokens).loss_N
        (first_N,) = torch.autograd.grad(loss_N.sum(), tokens.logp_pi_N, create_graph=True)
        assert not first_N.requires_grad


def test_the_mask_is_anchored_and_the_weight_is_not():
    # Against mu the ratio went up, against the anchor it went down.
    tokens = make_tokens([0.4], [0.5], [1.0], [0.9], anchor=[0.6])
    assert DPPO(None)(tokens).keep_N.item()
    same(gradient(DPPO(None), tokens), [-1.25])
    tokens = make_tokens([0.6], [0.5], [1.0], [0.9], anchor=[0.4])
    assert not DPPO(None)(tokens).keep_N.item()


def test_low_and_high_thresholds_belong_to_the_sign_of_the_advantage():
    tokens = make_tokens([0.5] * 2, [0.6, 0.4], [1.0, -1.0], [0.15] * 2, delta=(0.1, 0.2))
    assert DPPO(None)(tokens).keep_N.tolist() == [True, False]
    swapped = replace(tokens, limit_N=tokens.limit_N.flip(0))
    assert DPPO(None)(swapped).keep_N.tolist() == [False, True]


# Ratio masks ---------------------------------------------------------------------------------------------------------


@PROPERTY
@given(tokens=token_batches())
def test_ratio_clip_is_ppo(tokens: Tokens):
    expected_N = naive_gradient(lambda pi, mu, a, i: ppo_loss(pi / mu, a, 0.2, 0.28), tokens)
    same(gradient(RatioClip(0.2, 0.28, None), tokens), expected_N)


@PROPERTY
@given(tokens=token_batches(dtype=torch.float32))
def test_ratio_clip_is_ppo_in_float32(tokens: Tokens):
    expected_N = naive_gradient(lambda pi, mu, a, i: ppo_loss(pi / mu, a, 0.2, 0.28), tokens)
    found_N = gradient(RatioClip(0.2, 0.28, None), tokens).double()
    # Weights of up to 2 e^2 whose exponent is a float32 difference of numbers up to 10: 10 * 6e-8 of each.
    torch.testing.assert_close(found_N, expected_N, atol=1e-6, rtol=2e-6)


@PROPERTY
@given(tokens=token_batches())
def test_dppo_with_the_ratio_as_divergence_is_ppo(tokens: Tokens):
    ratio_N = (tokens.logp_pi_N.detach() - tokens.logp_mu_N).exp()
    limit_N = torch.where(tokens.advantage_N > 0, 0.28, 0.2).double()
    tokens = replace(tokens, distance_N=(ratio_N - 1).abs(), limit_N=limit_N)
    assert torch.equal(DPPO(None)(tokens).keep_N, RatioClip(0.2, 0.28, None)(tokens).keep_N)
    expected_N = naive_gradient(lambda pi, mu, a, i: ppo_loss(pi / mu, a, 0.2, 0.28), tokens)
    same(gradient(DPPO(None), tokens), expected_N)


def test_ratio_clip_ignores_the_divergence_and_its_thresholds():
    tokens = make_tokens([0.5, 0.5], [0.55, 0.61], [1.0, 1.0], [0.9, 0.0], delta=(0.0, 0.0))
    assert RatioClip(0.2, 0.2, None)(tokens).keep_N.tolist() == [True, False]


def test_minirl_masks_by_pi_old_and_weighs_by_mu():
    # pi/pi_old = 1.25 leaves the clip while pi/mu = 1.0 does not; then the other way round.
    tokens = make_tokens([0.5, 0.4], [0.5, 0.6], [1.0, 1.0], anchor=[0.4, 0.6])
    assert RatioClip(0.2, 0.2, None)(tokens).keep_N.tolist() == [False, True]
    same(gradient(RatioClip(0.2, 0.2, None), tokens), [0.0, -1.5])


@PROPERTY
@given(tokens=token_batches(), cap=st.sampled_from([None, 3.0]))
def test_policy_gradient_masks_nothing(tokens: Tokens, cap: float | None):
    expected_N = naive_gradient(
        lambda pi, mu, a, i: -min((pi / mu).item(), cap or math.inf) * a * pi.log(),
        tokens,
    )
    assert PolicyGradient(cap)(tokens).keep_N.all()
    same(gradient(PolicyGradient(cap), tokens), expected_N)
