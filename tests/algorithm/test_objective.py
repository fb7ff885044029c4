import math
from dataclasses import replace

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY, gradient, make_tokens, token_batches
from torch import Tensor

from dppo_cli.algorithm.objective import (
    DPPO,
    DRPO,
    GSPO,
    IPO,
    MinimalMask,
    PolicyGradient,
    RatioClip,
    Tokens,
    kl_to_reference,
    trust_mask,
)
from dppo_cli.errors import ConfigError, NumericalError

NO_PENALTY = [
    DPPO(None),
    DPPO(5.0),
    RatioClip(0.2, 0.28, None),
    PolicyGradient(3.0),
    MinimalMask(0.5, None),
    GSPO(3e-4, 4e-4),
    IPO(0.1, 0.0, None),
    DRPO(0.15),
]
EVERY = [*NO_PENALTY, IPO(0.1, 1e-3, None)]
BY_NAME = {"ids": lambda objective: type(objective).__name__}


def same(found_N: Tensor, expected_N: Tensor | list[float]) -> None:
    """Equal up to float64 rounding, where a weight is the exponential of a difference of logarithms up to 10."""
    expected_N = torch.as_tensor(expected_N, dtype=torch.float64)
    torch.testing.assert_close(found_N, expected_N, atol=1e-12, rtol=1e-12)


def naive_gradient(loss_of_token, tokens: Tokens) -> Tensor:
    """Autograd through a loss written for one token: f(pi, mu, A, index) of 0-dimensional float64 tensors."""
    logp_pi_N = tokens.logp_pi_N.detach().double().requires_grad_()
    mu_N, advantage_N = tokens.logp_mu_N.double().exp(), tokens.advantage_N.double()
    losses = [loss_of_token(x.exp(), mu_N[i], advantage_N[i], i) for i, x in enumerate(logp_pi_N)]
    (found_N,) = torch.autograd.grad(sum(losses), logp_pi_N)
    return found_N


# The mask ------------------------------------------------------------------------------------------------------------

LOW, HIGH = 0.1, 0.2


def mask(advantage: float, mu: float, pi: float, divergence: float) -> bool:
    columns = (
        torch.tensor([advantage]),
        torch.tensor([mu]).log(),
        torch.tensor([pi]).log(),
        torch.tensor([divergence]),
    )
    return trust_mask(*columns, LOW, HIGH).item()


@pytest.mark.parametrize(
    ("advantage", "pi", "divergence", "kept"),
    [
        (1.0, 0.6, 0.21, False),  # up, away from 1, too far
        (1.0, 0.6, 0.20, True),  # at the threshold itself
        (1.0, 0.6, 0.15, True),  # above the other sign's threshold only
        (1.0, 0.4, 0.99, True),  # up, back towards 1
        (1.0, 0.5, 0.99, True),  # r is exactly 1
        (-1.0, 0.4, 0.11, False),  # down, away from 1, too far
        (-1.0, 0.4, 0.10, True),
        (-1.0, 0.4, 0.09, True),
        (-1.0, 0.6, 0.99, True),  # down, back towards 1
        (-1.0, 0.5, 0.99, True),
        (0.0, 0.6, 0.99, True),  # nothing to mask
        (0.0, 0.4, 0.99, True),
        (1.0, 0.6, math.inf, False),  # an infinite KL is far, not broken
        (-1.0, 0.4, math.inf, False),
        (1e-30, 0.6, 0.21, False),  # the size of A does not matter
    ],
)
def test_mask_case_by_case(advantage, pi, divergence, kept):
    assert mask(advantage, 0.5, pi, divergence) is kept


@PROPERTY
@given(tokens=token_batches())
def test_mask_agrees_with_its_definition(tokens: Tokens):
    found_N = trust_mask(
        tokens.advantage_N, tokens.logp_mu_N, tokens.logp_pi_N, tokens.divergence_N, tokens.delta_low, tokens.delta_high
    )
    columns = zip(
        tokens.advantage_N.tolist(),
        tokens.logp_mu_N.exp().tolist(),
        tokens.logp_pi_N.exp().tolist(),
        tokens.divergence_N.tolist(),
        strict=True,
    )
    assert found_N.tolist() == [reference.keep(*column, tokens.delta_low, tokens.delta_high) for column in columns]


@PROPERTY
@given(mu=st.floats(0.01, 0.99), pi=st.floats(0.01, 0.99), size=st.floats(0.01, 10), divergence=st.floats(0, 1e3))
def test_a_step_back_towards_one_is_never_masked(mu, pi, size, divergence):
    assert mask(size if pi <= mu else -size, mu, pi, divergence)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("pi", [0.4, 0.5, 0.6])
def test_edge_2_nan_divergence_is_refused(advantage, pi):
    with pytest.raises(NumericalError, match="1 of 1 tokens"):
        mask(advantage, 0.5, pi, math.nan)


def test_edge_2_one_nan_among_many_is_refused_by_every_user_of_the_mask():
    tokens = make_tokens([0.5] * 3, [0.6] * 3, [1.0] * 3, [0.0, math.nan, 0.0])
    with pytest.raises(NumericalError, match="1 of 3 tokens"):
        DPPO(None)(tokens)
    tokens = make_tokens([0.5, math.nan], [0.6] * 2, [1.0] * 2)
    for objective in (RatioClip(0.2, 0.2, None), GSPO(0.2, 0.2)):
        with pytest.raises(NumericalError):
            objective(replace_dtype(tokens, torch.float32))


def replace_dtype(tokens: Tokens, dtype: torch.dtype) -> Tokens:
    floats = ("logp_mu_N", "logp_anchor_N", "advantage_N", "divergence_N")
    logp_pi_N = tokens.logp_pi_N.detach().to(dtype).requires_grad_()
    return replace(tokens, logp_pi_N=logp_pi_N, **{name: getattr(tokens, name).to(dtype) for name in floats})


def test_edge_1_equal_policies_keep_everything_and_weigh_by_the_advantage():
    advantage = [1.0, -1.0, 0.5, 0.0]
    for objective in [*EVERY, GSPO(1e-9, 1e-9), RatioClip(1e-9, 1e-9, None)]:
        tokens = make_tokens([0.3] * 4, [0.3] * 4, advantage, [0.0] * 4, delta=(0.0, 0.0), dtype=torch.float32)
        assert objective(tokens).keep_N.all()
        assert gradient(objective, tokens).tolist() == [-a for a in advantage]


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
    divergence, low, high = tokens.divergence_N.tolist(), tokens.delta_low, tokens.delta_high

    def loss(pi: Tensor, mu: Tensor, advantage: Tensor, i: int) -> Tensor:
        kept = reference.keep(advantage.item(), mu.item(), pi.item(), divergence[i], low, high)
        weight = kept * min((pi / mu).item(), cap or math.inf) * advantage.item()
        return -weight * pi.log()

    same(gradient(DPPO(cap), tokens), naive_gradient(loss, tokens))


@PROPERTY
@given(tokens=token_batches())
def test_dppo_without_cap_is_the_gradient_of_the_masked_surrogate(tokens: Tokens):
    """Maximise M r A with r differentiable: the same gradient as -sg(M r A) log pi."""
    kept = DPPO(None)(tokens).keep_N.tolist()
    same(gradient(DPPO(None), tokens), naive_gradient(lambda pi, mu, a, i: -kept[i] * pi / mu * a, tokens))


@pytest.mark.parametrize("objective", [DPPO(2.0), PolicyGradient(2.0), RatioClip(9.0, 9.0, 2.0)], **BY_NAME)
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
    assert DPPO(None)(replace(tokens, delta_low=0.2, delta_high=0.1)).keep_N.tolist() == [False, True]


# Ratio masks ---------------------------------------------------------------------------------------------------------


def ppo_loss(r: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)


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
    tokens = replace(tokens, divergence_N=(ratio_N - 1).abs(), delta_low=0.2, delta_high=0.28)
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


# Sequence masks ------------------------------------------------------------------------------------------------------


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


# The other baselines -------------------------------------------------------------------------------------------------


def test_minimal_mask_by_hand():
    tokens = make_tokens([0.9, 0.9, 0.9, 0.1, 0.9], [0.3, 0.3, 0.45, 0.9, 0.39], [-1.0, 1.0, -1.0, -1.0, 0.0])
    assert MinimalMask(0.5, None)(tokens).keep_N.tolist() == [False, True, True, True, True]
    same(gradient(MinimalMask(0.5, None), tokens), [0.0, -0.3 / 0.9, 0.45 / 0.9, 9.0, 0.0])


def test_minimal_mask_includes_its_threshold():
    # From 1 to 0: the one fall that floating point represents exactly.
    tokens = make_tokens([1.0], [0.0], [-1.0])
    assert not MinimalMask(1.0, None)(tokens).keep_N.item()


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


# KL to a reference ---------------------------------------------------------------------------------------------------


@PROPERTY
@given(pair=reference.pairs(), shift=st.lists(st.floats(-2, 2), min_size=8, max_size=8))
def test_expected_gradient_is_that_of_the_exact_kl_to_the_reference(pair: reference.Pair, shift: list[float]):
    mu, ref = torch.tensor([pair.mu, pair.pi], dtype=torch.float64)
    logits = torch.tensor(shift[: len(mu)], dtype=torch.float64, requires_grad=True)
    log_pi = logits.log_softmax(-1)
    (found,) = torch.autograd.grad((mu * kl_to_reference(log_pi, ref.log(), mu.log())).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((log_pi.exp() * (log_pi - ref.log())).sum(), logits)
    same(found, expected)


def test_kl_to_reference_by_hand():
    logp_pi_N, logp_ref_N, logp_mu_N = (torch.tensor([p], dtype=torch.float64).log() for p in (0.4, 0.1, 0.2))
    logp_pi_N.requires_grad_()
    loss_N = kl_to_reference(logp_pi_N, logp_ref_N, logp_mu_N)
    same(loss_N.detach(), [math.log(4.0) ** 2])
    (found_N,) = torch.autograd.grad(loss_N.sum(), logp_pi_N)
    same(found_N, [2 * math.log(4.0)])


# What holds for all of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", NO_PENALTY, **BY_NAME)
def test_edge_10_no_advantage_is_exactly_no_gradient(objective):
    pi = [0.5, 0.501, 0.7, 0.99, 0.3, 1e-6]
    tokens = make_tokens([0.5] * 6, pi, [0.0] * 6, [0.9] * 6, sequence=[0, 1, 2, 3, 4, 5], dtype=torch.float32)
    assert objective(tokens).keep_N.all() or isinstance(objective, IPO)
    assert gradient(objective, tokens).abs().max() == 0


@pytest.mark.parametrize("objective", EVERY, **BY_NAME)
def test_edge_10_an_objective_says_whether_tokens_without_advantage_matter(objective):
    tokens = make_tokens([0.5], [0.6], [0.0], dtype=torch.float32)
    assert objective.needs_all_tokens is bool(gradient(objective, tokens).abs().max() > 0)


@pytest.mark.parametrize("objective", [DPPO(None), DPPO(5.0), RatioClip(0.2, 0.2, None), GSPO(0.2, 0.2)], **BY_NAME)
def test_edge_3_masked_token_without_mass_leaves_a_finite_loss(objective):
    """pi = 0 gives a log-prob of -inf and mu = 0 an infinite ratio; both are masked here and add exactly nothing."""
    for mu, pi, advantage in ((0.5, 0.0, -1.0), (0.0, 0.5, 1.0)):
        tokens = make_tokens([mu], [pi], [advantage], [math.inf], dtype=torch.float32)
        loss_N, keep_N = objective(tokens)
        assert not keep_N.item() and loss_N.item() == 0
        assert gradient(objective, tokens).item() == 0


@pytest.mark.parametrize("objective", NO_PENALTY[:-2], **BY_NAME)
def test_edge_3_infinite_ratio_without_advantage(objective):
    tokens = make_tokens([0.0], [0.5], [0.0], dtype=torch.float32)
    assert gradient(objective, tokens).item() == 0


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: DPPO(0.5), "ratio_cap=0.5"),
        (lambda: DPPO(math.nan), "ratio_cap=nan"),
        (lambda: PolicyGradient(0.99), "ratio_cap"),
        (lambda: RatioClip(0.2, 0.2, 0.0), "ratio_cap"),
        (lambda: RatioClip(0.0, 0.2, None), "eps_low"),
        (lambda: RatioClip(0.2, -0.1, None), "eps_high"),
        (lambda: GSPO(0.0, 0.1), "eps_low"),
        (lambda: GSPO(0.1, math.nan), "eps_high"),
        (lambda: MinimalMask(0.0, None), "threshold"),
        (lambda: IPO(0.0, 0.0, None), r"\.eps="),
        (lambda: IPO(0.1, -1.0, None), "penalty"),
        (lambda: DRPO(0.0), "delta"),
    ],
)
def test_options_out_of_range_are_refused_by_name(make, key):
    with pytest.raises(ConfigError, match=key):
        make()


def test_a_cap_of_one_is_allowed():
    assert DPPO(1.0).ratio_cap == 1.0
