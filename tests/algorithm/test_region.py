"""Trust regions: worked examples, and the prefix budget against one token at a time in float64."""

import math

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY

from dppo_cli.algorithm.objective import trust_mask
from dppo_cli.algorithm.region import PerToken, PrefixBudget, Region, SequenceMean
from dppo_cli.errors import ConfigError, NumericalError

FIXED = PrefixBudget(w_min=0.8, budget=0.02, adaptive=False)


def kept(
    region: Region, divergence: list[float], ratio: list[float], sequence: list[int] | None = None, delta: float = 0.15
) -> list[int]:
    """The mask of tokens with A = 1."""
    divergence_N, log_ratio_N = torch.tensor(divergence), torch.tensor(ratio).log()
    delta_N = torch.full_like(divergence_N, delta)
    sequence_N = torch.tensor(sequence or [0] * len(divergence))
    distance_N, limit_N = region(divergence_N, delta_N, log_ratio_N, sequence_N)
    one_N, zero_N = torch.ones_like(delta_N), torch.zeros_like(delta_N)
    return trust_mask(one_N, zero_N, log_ratio_N, distance_N, limit_N, limit_N).int().tolist()


UP = [1.1] * 4


def test_the_prefix_budget_by_hand():
    """c = (.15, .03, -.082, -.108) and w D = (.14, .1307, .0433, .144): only the first is inside."""
    divergence = [0.14, 0.14, 0.05, 0.18]
    distance_N, limit_N = FIXED(torch.tensor(divergence), torch.full((4,), 0.15), torch.zeros(4), torch.zeros(4).long())
    assert distance_N.tolist() == pytest.approx([0.14, 0.130667, 0.043333, 0.144], abs=1e-6)
    assert limit_N.tolist() == pytest.approx([0.15, 0.03, -0.082, -0.108], abs=1e-6)
    assert kept(FIXED, divergence, UP) == [1, 0, 0, 0]
    assert kept(PerToken(), divergence, UP) == [1, 1, 1, 0]
    assert kept(FIXED, divergence, [1.1, 1.1, 0.9, 1.1]) == [1, 0, 1, 0], "a step back towards r = 1 is kept"


def test_a_prefix_that_has_not_moved_leaves_no_more_than_delta():
    # w_T D = 0.8 x 0.18 = 0.144 would be inside of delta, but the prefix has used more than its budget.
    assert kept(FIXED, [0.05, 0.04, 0.02, 0.18], UP) == [1, 1, 1, 0]
    assert kept(FIXED, [0.01, 0.01, 0.01, 0.18], UP) == [1, 1, 1, 1]
    # 0.8 x 0.2 = 0.16, and nothing of the budget is used.
    assert kept(FIXED, [0.0, 0.0, 0.0, 0.2], UP) == [1, 1, 1, 0]


def test_a_response_of_one_token_has_weight_1():
    distance_N, limit_N = FIXED(torch.tensor([0.2]), torch.tensor([0.15]), torch.zeros(1), torch.tensor([0]))
    assert (distance_N.item(), limit_N.item()) == pytest.approx((0.2, 0.15))


def test_responses_do_not_touch_each_other():
    """Interleaved, as no batch is, and of different lengths."""
    first, second = [0.14, 0.14, 0.05, 0.18], [0.05, 0.02]
    together = [0.14, 0.05, 0.14, 0.02, 0.05, 0.18]
    whole = kept(FIXED, together, [1.1] * 6, [0, 1, 0, 1, 0, 0])
    assert [whole[0], whole[2], whole[4], whole[5]] == kept(FIXED, first, UP)
    assert [whole[1], whole[3]] == kept(FIXED, second, [1.1] * 2)


@PROPERTY
@given(
    divergence=st.lists(st.floats(0, 0.25, width=32), min_size=1, max_size=12),
    delta=st.floats(0.05, 0.3),
    w_min=st.sampled_from([0.2, 0.8, 1.0]),
    adaptive=st.booleans(),
)
def test_the_prefix_budget_is_algorithm_1(divergence: list[float], delta: float, w_min: float, adaptive: bool):
    budget, length = 0.02, len(divergence)
    if adaptive:
        budget = float(numpy.clip(numpy.quantile(numpy.array(divergence), 0.9), 0.02, 0.04))
    used = allowed = 0.0
    expected = []
    for t, value in enumerate(divergence, start=1):
        weight = 1 - (1 - w_min) * (t - 1) / max(length - 1, 1)
        expected.append((weight * value, min(delta, delta + budget * allowed - used)))
        used, allowed = used + weight * value, allowed + weight
    divergence_N = torch.tensor(divergence)
    region = PrefixBudget(w_min, 0.02, adaptive)
    sequence_N = torch.zeros(length, dtype=torch.int64)
    found = region(divergence_N, torch.full_like(divergence_N, delta), torch.zeros_like(divergence_N), sequence_N)
    torch.testing.assert_close(torch.stack(found, dim=1), torch.tensor(expected), atol=2e-6, rtol=1e-5)


def test_thresholds_are_those_of_each_token():
    delta_N = torch.tensor([0.1, 0.2])
    _, limit_N = FIXED(torch.tensor([0.01, 0.01]), delta_N, torch.zeros(2), torch.tensor([0, 0]))
    assert limit_N.tolist() == pytest.approx([0.1, 0.2])


def test_after_an_infinite_divergence_nothing_more_is_inside():
    assert kept(PrefixBudget(0.8, 0.002, True), [math.inf, 0.0, 0.0], [1.1] * 3) == [0, 0, 0]


def test_a_divergence_that_is_nan_is_refused():
    for region in (PerToken(), FIXED, PrefixBudget(0.8, 0.02, True)):
        with pytest.raises(NumericalError, match="NaN"):
            kept(region, [0.1, math.nan], [1.1, 1.1])


def test_the_sequence_mean_by_hand():
    """|r - 1| = (.3, .1, 0), mean .133; the second token moves back, the third not at all."""
    ratio = [1.3, 0.9, 1.0]
    assert kept(SequenceMean(0.1), [0.0] * 3, ratio) == [0, 1, 1]
    assert kept(SequenceMean(0.2), [0.0] * 3, ratio) == [1, 1, 1]
    assert kept(SequenceMean(0.2), [0.9] * 3, ratio) == [1, 1, 1], "the divergence does not matter"
    # The mean of each response, not of the batch.
    assert kept(SequenceMean(0.2), [0.0] * 4, [1.3, 1.3, 1.1, 1.1], [0, 0, 1, 1]) == [0, 0, 1, 1]


def test_the_mean_ratio_distance_is_twice_the_total_variation():
    """Over the tokens that mu samples: sum mu |r - 1| = sum |pi - mu|."""
    mu, pi = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.4, 0.2, 0.4])
    counts = torch.tensor([5, 3, 2])
    log_ratio_N = (pi / mu).log().repeat_interleave(counts)
    distance_N, _ = SequenceMean(0.2)(log_ratio_N, log_ratio_N, log_ratio_N, torch.zeros(10, dtype=torch.int64))
    assert distance_N.tolist() == pytest.approx([float((pi - mu).abs().sum())] * 10, abs=1e-6)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: PrefixBudget(0.0, 0.02, True), "w_min"),
        (lambda: PrefixBudget(1.5, 0.02, True), "w_min"),
        (lambda: PrefixBudget(0.8, 0.0, True), "budget"),
        (lambda: SequenceMean(0.0), "upper"),
    ],
)
def test_values_out_of_range_are_refused(make, named):
    with pytest.raises(ConfigError, match=rf"region\.{named}="):
        make()
