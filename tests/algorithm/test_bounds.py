"""The exact divergence lies between the value over a reduced support and that value plus its slack."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY, Pair, likeliest, logs, pairs
from torch import Tensor

from dppo_cli.algorithm.approx import binary_support, topk_support
from dppo_cli.algorithm.divergence import KL, TotalVariation

TV, NATS = TotalVariation(0.15, 0.15), KL(0.05, 0.05)
MU = [0.60, 0.25, 0.05, 0.04, 0.03, 0.03]
PI = [0.50, 0.30, 0.08, 0.02, 0.09, 0.01]


def bounds(divergence: TotalVariation | KL, pair: Pair, k: int | None) -> tuple[float, float]:
    """Of one token; k = None: binary."""
    log_mu, log_pi = pair.logs
    support: tuple[Tensor, Tensor]
    if k is None:
        support = binary_support(log_mu[:, pair.token], log_pi[:, pair.token])
    else:
        ids = torch.tensor([likeliest(pair.mu, k)])
        token = torch.tensor([pair.token])
        support = topk_support(token, log_mu[:, pair.token], ids, log_mu.gather(-1, ids), log_pi)
    lower = divergence(*support)
    slack = divergence.slack(support[0][:, -1], support[1][:, -1], log_pi.float())
    return lower.item(), (lower + slack).item()


def test_two_named_tokens_by_hand():
    """S = {0, 1}, masses of the rest .15 and .2; the exact values are .14 and .0680."""
    pair = Pair(MU, PI, 0)
    assert bounds(TV, pair, 2) == pytest.approx((0.10, 0.25), abs=1e-6)
    assert bounds(NATS, pair, 2) == pytest.approx((0.0207, 0.4700), abs=5e-5)
    rest = 0.6 * math.log(0.6 / 0.5) + 0.25 * math.log(0.25 / 0.3)
    assert bounds(NATS, pair, 2)[1] == pytest.approx(rest + 0.15 * math.log(0.15 / 0.01), abs=1e-6)
    assert reference.tv(MU, PI) == pytest.approx(0.14)
    assert reference.kl(MU, PI) == pytest.approx(0.0680, abs=5e-5)


def test_binary_decides_where_the_token_is_nearly_certain():
    assert bounds(TV, Pair([0.98, 0.02], [0.95, 0.05], 0), None) == pytest.approx((0.03, 0.05), abs=1e-6)
    assert bounds(TV, Pair([0.3, 0.7], [0.3, 0.7], 0), None) == pytest.approx((0.0, 0.7), abs=1e-6)


@PROPERTY
@given(pair=pairs(), k=st.sampled_from([None, 1, 2, 4]))
def test_the_exact_divergence_is_between(pair: Pair, k: int | None):
    for divergence, exact in ((TV, reference.tv(pair.mu, pair.pi)), (NATS, reference.kl(pair.mu, pair.pi))):
        lower, upper = bounds(divergence, pair, None if k is None else min(k, len(pair.mu)))
        assert lower - 2e-6 <= exact <= upper + 2e-6


def test_with_every_token_named_both_bounds_are_the_divergence():
    pair = Pair(MU, PI, 3)
    for divergence, exact in ((TV, 0.14), (NATS, reference.kl(MU, PI))):
        lower, upper = bounds(divergence, pair, 6)
        assert lower == pytest.approx(exact, abs=1e-6)
        assert upper == pytest.approx(exact, abs=2e-6)


def test_a_token_that_both_exclude_leaves_no_slack_where_all_others_are_named():
    """The mass of the rest is a rounding there."""
    pair = Pair([0.5, 0.5, 0.0], [0.4, 0.6, 0.0], 0)
    assert bounds(NATS, pair, 3) == pytest.approx((0.02041, 0.02041), abs=1e-5)


def test_a_token_that_pi_excludes_leaves_the_kl_without_an_upper_bound():
    log_mu, log_pi = logs([0.5, 0.3, 0.2])[0], torch.tensor([0.5, 0.5, 0.0]).log()
    support = binary_support(log_mu[:1], log_pi[:1])
    assert NATS.slack(support[0][:, -1], support[1][:, -1], log_pi[None]).item() == math.inf
    assert TV.slack(support[0][:, -1], support[1][:, -1], log_pi[None]).item() == pytest.approx(0.5)
