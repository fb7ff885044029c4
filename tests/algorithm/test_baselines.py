"""The other baselines: the sequence ratio of GSPO, the minimal mask, IPO, and DRPO, which has a penalty and no mask."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY, gradient, make_tokens, naive_gradient, ppo_loss, same, token_batches
from torch import Tensor

from dppo_cli.algorithm.objective import DRPO, GSPO, IPO, MinimalMask, Tokens

# GSPO ----------------------------------------------------------------------------------------------------------------


def naive_gspo(tokens: Tokens, low: float, high: float) -> tuple[Tensor, list[bool]]:
    """Autograd of length * min(s A, clip(s) A) over whole sequences; and which tokens have a gradient."""
    logp_pi_N = tokens.logp_pi_N.detach().double().requires_grad_()
    losses = []
    for sequence in tokens.sequence_N.unique().tolist():
        mine = tokens.sequence_N == sequence
        s = (logp_pi_N[mine] - tokens.logp_mu_N.double()[mine]).mean().exp()
        losses.append(mine.sum() * ppo_loss(s, tokens.advantage_N.double()[mine][0], low, high))
    (found_N,) = torch.autograd.grad(sum(losses), logp_pi_N)
    return found_N, [g != 0 or a == 0 for g, a in zip(found_N.tolist(), tokens.advantage_N.tolist(), strict=True)]


@PROPERTY
@given(tokens=token_batches(dtype=torch.float32))
def test_gspo_is_the_gradient_of_the_clipped_sequence_ratio(tokens: Tokens):
    # One advantage per sequence: that of its first token.
    first = [tokens.sequence_N.tolist().index(s) for s in tokens.sequence_N.tolist()]
    tokens = replace(tokens, advantage_N=tokens.advantage_N[first])
    expected_N, kept = naive_gspo(tokens, 0.1, 0.3)
    assert GSPO(0.1, 0.3)(tokens).keep_N.tolist() == kept
    torch.testing.assert_close(gradient(GSPO(0.1, 0.3), tokens).double(), expected_N, atol=1e-6, rtol=2e-6)


def test_gspo_by_hand():
    # Sequences 0 and 1 interleaved. s_0 = sqrt(1.21) = 1.1; s_1 = 0.8 from a single token.
    tokens = make_tokens([0.5] * 3, [0.605, 0.4, 0.5], [1.0, -1.0, 1.0], sequence=[0, 1, 0], dtype=torch.float32)
    assert GSPO(0.1, 0.2)(tokens).keep_N.tolist() == [True, False, True]
    assert gradient(GSPO(0.1, 0.2), tokens).tolist() == pytest.approx([-1.1, 0.0, -1.1], abs=1e-6)
    assert GSPO(0.3, 0.05)(tokens).keep_N.tolist() == [False, True, False]
    assert gradient(GSPO(0.3, 0.05), tokens).tolist() == pytest.approx([0.0, 0.8, 0.0], abs=1e-6)


# Minimal mask --------------------------------------------------------------------------------------------------------


def test_minimal_mask_by_hand():
    tokens = make_tokens([0.9, 0.9, 0.9, 0.1, 0.9], [0.3, 0.3, 0.45, 0.9, 0.39], [-1.0, 1.0, -1.0, -1.0, 0.0])
    assert MinimalMask(0.5, None)(tokens).keep_N.tolist() == [False, True, True, True, True]
    same(gradient(MinimalMask(0.5, None), tokens), [0.0, -0.3 / 0.9, 0.45 / 0.9, 9.0, 0.0])


def test_minimal_mask_includes_its_threshold():
    # From 1 to 0: the one fall that floating point represents exactly.
    tokens = make_tokens([1.0], [0.0], [-1.0])
    assert not MinimalMask(1.0, None)(tokens).keep_N.item()


# IPO -----------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(tokens=token_batches(), penalty=st.sampled_from([0.0, 1e-3, 0.5]))
def test_ipo_gradient(tokens: Tokens, penalty: float):
    def loss(pi: Tensor, mu: Tensor, advantage: Tensor, i: int) -> Tensor:
        kept = abs((pi - mu).item()) <= 0.1
        return -kept * pi / mu * advantage + penalty * (pi / mu).log() ** 2

    same(gradient(IPO(0.1, penalty, None), tokens), naive_gradient(loss, tokens))


def test_ipo_drops_whatever_the_sign_and_the_direction():
    tokens = make_tokens([0.5] * 6, [0.65, 0.65, 0.35, 0.35, 0.55, 0.45], [1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    assert IPO(0.1, 1e-3, None)(tokens).keep_N.tolist() == [False, False, False, False, True, True]
    expected_N = 2e-3 * (tokens.logp_pi_N - tokens.logp_mu_N).detach()  # the penalty stays where the mask drops
    same(gradient(IPO(0.1, 1e-3, None), tokens)[:4], expected_N[:4])


def test_ipo_keeps_its_threshold():
    tokens = make_tokens([1.0], [0.0], [1.0])
    assert IPO(1.0, 0.0, None)(tokens).keep_N.item()


# DRPO ----------------------------------------------------------------------------------------------------------------


@PROPERTY
@given(tokens=token_batches(), delta=st.sampled_from([0.15, 1.0, 12.5]))
def test_drpo_gradient(tokens: Tokens, delta: float):
    def loss(pi: Tensor, mu: Tensor, advantage: Tensor, i: int) -> Tensor:
        r = pi / mu
        return -advantage * r + advantage.abs() * mu * (r - 1) ** 2 / (2 * delta)

    same(gradient(DRPO(delta), tokens), naive_gradient(loss, tokens))
    assert DRPO(delta)(tokens).keep_N.all()


@PROPERTY
@given(tokens=token_batches(), delta=st.sampled_from([0.15, 1.0, 12.5]))
def test_drpo_weight_formula(tokens: Tokens, delta: float):
    """r A grad log pi is weighed by 1 - sign(A (r - 1)) |pi - mu| / delta."""
    columns = zip(
        tokens.logp_pi_N.exp().tolist(), tokens.logp_mu_N.exp().tolist(), tokens.advantage_N.tolist(), strict=True
    )
    expected = []
    for pi, mu, advantage in columns:
        direction = advantage * (pi / mu - 1)
        sign = (direction > 0) - (direction < 0)
        expected.append(-(1 - sign * abs(pi - mu) / delta) * pi / mu * advantage)
    same(gradient(DRPO(delta), tokens), expected)


def test_drpo_turns_only_within_reach():
    # |pi - mu| = 0.4: delta = 0.2 turns the gradient round, the authors' 12.5 takes 3% off it.
    tokens = make_tokens([0.4], [0.8], [1.0])
    same(gradient(DRPO(0.2), tokens), [2.0])
    same(gradient(DRPO(12.5), tokens), [-2.0 * (1 - 0.4 / 12.5)])
