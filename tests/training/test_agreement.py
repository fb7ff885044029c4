"""How far two models are from each other."""

import math

import pytest
import torch

from dppo_cli.training.agreement import agreement


def test_of_two_small_distributions():
    """p = (1/2, 1/2), q = (1/4, 3/4) at one token, equal at the other."""
    p = torch.tensor([[0.0, 0.0, -math.inf], [1.0, 2.0, 3.0]])
    q = torch.tensor([[math.log(0.25), math.log(0.75), -math.inf], [2.0, 3.0, 4.0]])
    found = agreement([p[:1], p[1:]], [q[:1], q[1:]])
    assert found.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert found.tv == pytest.approx(0.25 / 2)
    assert (found.greedy, found.tokens) == (0.5, 2)
    same = agreement([p], [p])
    assert (same.kl, same.tv, same.greedy) == (0.0, 0.0, 1.0)


def test_the_largest_difference_of_logits():
    p = torch.tensor([[0.0, 1.0], [2.0, -3.0]])
    q = torch.tensor([[0.5, 1.0], [2.0, -1.0]])
    assert agreement([p], [q]).logit == 2.0
    assert agreement([p[:1], p[1:]], [q[:1], q[1:]]) == agreement([p], [q])


def test_nan_is_no_agreement():
    p = torch.tensor([[0.0, 1.0]])
    found = agreement([p], [torch.tensor([[math.nan, 1.0]])])
    assert found.logit == math.inf and math.isnan(found.kl) and math.isnan(found.tv)
