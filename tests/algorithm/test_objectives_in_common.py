"""What holds for all objectives, and what they say of themselves."""

import math
from dataclasses import is_dataclass, replace

import pytest
import torch
from reference import gradient, make_tokens

from dppo_cli.algorithm import objective as objective_module
from dppo_cli.algorithm.objective import (
    DPPO,
    DRPO,
    GSPO,
    IPO,
    MinimalMask,
    PolicyGradient,
    RatioClip,
    Tokens,
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

TINY = 1e-6
TINY_THRESHOLDS = [
    DPPO(None),
    RatioClip(TINY, TINY, None),
    PolicyGradient(None),
    PolicyGradient(3.0),
    MinimalMask(TINY, None),
    GSPO(TINY, TINY),
    IPO(TINY, 1e-3, None),
    DRPO(TINY),
]


@pytest.mark.parametrize("objectives", [EVERY, TINY_THRESHOLDS])
def test_no_objective_is_forgotten_here(objectives):
    options = {kind for kind in vars(objective_module).values() if is_dataclass(kind) and hasattr(kind, "masks")}
    assert {type(objective) for objective in objectives} == options


@pytest.mark.parametrize("objective", TINY_THRESHOLDS, **BY_NAME)
def test_an_objective_says_whether_it_masks(objective):
    """Of many tokens that moved, with advantages of both signs, a mask of a tiny threshold removes some."""
    generator = torch.Generator().manual_seed(0)
    mu, pi, divergence = torch.empty(3, 256).uniform_(0.01, 0.99, generator=generator).tolist()
    advantage = torch.randn(256, generator=generator).tolist()
    sequence = torch.randint(32, (256,), generator=generator).tolist()
    delta = (TINY, TINY)
    tokens = make_tokens(mu, pi, advantage, divergence, sequence=sequence, delta=delta, dtype=torch.float32)
    assert objective.masks is bool((~objective(tokens).keep_N).any())


def test_edge_1_equal_policies_keep_everything_and_weigh_by_the_advantage():
    advantage = [1.0, -1.0, 0.5, 0.0]
    for objective in [*EVERY, GSPO(1e-9, 1e-9), RatioClip(1e-9, 1e-9, None)]:
        tokens = make_tokens([0.3] * 4, [0.3] * 4, advantage, [0.0] * 4, delta=(0.0, 0.0), dtype=torch.float32)
        assert objective(tokens).keep_N.all()
        assert gradient(objective, tokens).tolist() == [-a for a in advantage]


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
