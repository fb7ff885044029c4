import math

import pytest
import reference
import torch
from hypothesis import given
from reference import PROPERTY, Pair, logs, pairs

from dppo_cli.algorithm.divergence import KL, TotalVariation
from dppo_cli.errors import ConfigError

TV = TotalVariation(0.15, 0.15)
NATS = KL(0.05, 0.05)
BOTH = pytest.mark.parametrize("divergence", [TV, NATS])
# Eight float32 terms of size <= 1, each a few roundings of 6e-8; for KL each is scaled by |log mu - log pi| <= 8.
ATOL = 1e-6


def test_total_variation_by_hand():
    found_N = TV(logs([0.5, 0.3, 0.2], [0.9, 0.1, 0.0]), logs([0.2, 0.3, 0.5], [0.1, 0.9, 0.0]))
    torch.testing.assert_close(found_N, torch.tensor([0.3, 0.8]), atol=ATOL, rtol=0)


def test_kl_by_hand_with_mu_first():
    even, skewed = [0.5, 0.5], [0.25, 0.75]
    forward = 0.5 * math.log(4 / 3)  # 1/2 log 2 + 1/2 log(2/3)
    backward = 0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2)
    found_N = NATS(logs(even, skewed), logs(skewed, even))
    torch.testing.assert_close(found_N, torch.tensor([forward, backward]), atol=ATOL, rtol=0)


def test_policies_without_a_common_outcome():
    mu, pi = logs([1.0, 0.0]), logs([0.0, 1.0])
    assert TV(mu, pi).tolist() == [1.0]
    assert NATS(mu, pi).tolist() == [math.inf]


def test_total_variation_never_exceeds_one_by_rounding():
    # Float32 probabilities that sum to 1 + 2^-22 on either side.
    over = math.log(0.5) + 2.0**-21
    mu, pi = torch.tensor([[over, over, -math.inf, -math.inf]]), torch.tensor([[-math.inf, -math.inf, over, over]])
    assert TV(mu, pi).tolist() == [1.0]


def test_kl_never_falls_below_zero_by_rounding():
    # pi sums to 1 + 2^-21, so the terms sum to -2^-21.
    mu = logs([0.5, 0.5])
    assert NATS(mu, mu + 2.0**-21).tolist() == [0.0]


@BOTH
@PROPERTY
@given(pair=pairs())
def test_edge_1_equal_bits_are_no_divergence(divergence, pair):
    log_mu = torch.cat([pair.logs[0], torch.tensor([[-math.inf]])], dim=-1)
    assert divergence(log_mu, log_mu.clone()).tolist() == [0.0]


@BOTH
@pytest.mark.parametrize("broken", [[math.nan, -1.0], [-1.0, math.nan], [math.nan, math.nan]])
def test_edge_2_nan_stays_nan(divergence, broken):
    broken, sound = torch.tensor([broken]), logs([0.4, 0.6])
    assert torch.isnan(divergence(broken, sound)).all()
    assert torch.isnan(divergence(sound, broken)).all()


def test_edge_3_outcome_without_mu_adds_nothing_to_kl():
    mu, pi = [0.5, 0.5, 0.0], [0.25, 0.5, 0.25]
    assert NATS(logs(mu), logs(pi)).item() == pytest.approx(0.5 * math.log(2), abs=ATOL)
    assert TV(logs(mu), logs(pi)).item() == pytest.approx(0.25, abs=ATOL)


def test_edge_3_outcome_without_either_adds_nothing():
    mu, pi = [0.5, 0.5, 0.0], [0.25, 0.75, 0.0]
    assert NATS(logs(mu), logs(pi)).item() == pytest.approx(reference.kl(mu, pi), abs=ATOL)


def test_edge_3_outcome_without_pi():
    mu, pi = [0.5, 0.3, 0.2], [0.5, 0.5, 0.0]
    assert NATS(logs(mu), logs(pi)).tolist() == [math.inf]
    assert TV(logs(mu), logs(pi)).item() == pytest.approx(0.2, abs=ATOL)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edge_2_low_precision_is_upcast_before_any_exponential(divergence, dtype):
    mu, pi = logs([0.61, 0.28, 0.11]).to(dtype), logs([0.57, 0.3, 0.13]).to(dtype)
    exact = (reference.tv if divergence is TV else reference.kl)(*(x.double().exp()[0].tolist() for x in (mu, pi)))
    found = divergence(mu, pi)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact, abs=1e-7)


@PROPERTY
@given(pair=pairs())
def test_both_agree_with_float64(pair: Pair):
    assert TV(*pair.logs).item() == pytest.approx(reference.tv(pair.mu, pair.pi), abs=ATOL)
    assert NATS(*pair.logs).item() == pytest.approx(reference.kl(pair.mu, pair.pi), abs=ATOL)


@PROPERTY
@given(pair=pairs(spread=30.0))
def test_ranges_symmetry_and_pinsker(pair: Pair):
    mu, pi = pair.logs
    total_variation, nats = TV(mu, pi).item(), NATS(mu, pi).item()
    assert 0 <= total_variation <= 1 and nats >= 0
    assert TV(pi, mu).item() == total_variation
    assert total_variation**2 <= nats / 2 + ATOL


def test_rows_are_independent():
    mu, pi = logs([0.5, 0.5], [0.9, 0.1], [0.3, 0.7]), logs([0.4, 0.6], [0.9, 0.1], [0.7, 0.3])
    for divergence in (TV, NATS):
        alone = [divergence(mu[i : i + 1], pi[i : i + 1]).item() for i in range(3)]
        assert divergence(mu, pi).tolist() == alone


@pytest.mark.parametrize("kind", [TotalVariation, KL])
@pytest.mark.parametrize("wrong", [-0.01, math.nan])
def test_thresholds_out_of_range_are_refused_by_name(kind, wrong):
    with pytest.raises(ConfigError, match=r"divergence\.delta_low"):
        kind(wrong, 0.1)
    with pytest.raises(ConfigError, match=r"divergence\.delta_high"):
        kind(0.1, wrong)


def test_only_total_variation_ends_at_one():
    with pytest.raises(ConfigError, match=r"\[0, 1\]"):
        TotalVariation(0.1, 1.01)
    assert TotalVariation(0.0, 1.0).delta_high == 1.0
    assert KL(0.0, 1.01).delta_high == 1.01
