import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY

from dppo_cli.algorithm.advantage import GroupMean, GroupStd, LeaveOneOut

ALL = pytest.mark.parametrize("kind", [GroupMean(), GroupStd(), LeaveOneOut()], ids=lambda kind: type(kind).__name__)
# Rewards of size 10 in float32: sixteen roundings of 5e-7 at most.
ATOL = 1e-5
REWARDS = st.lists(st.one_of(st.floats(-10, 10), st.just(math.nan)), min_size=2, max_size=8)


def test_group_mean_by_hand():
    found = GroupMean()(torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 1.0, 1.0, -1.0]]))
    assert found.tolist() == [[0.75, -0.25, -0.25, -0.25], [2.0, 0.0, 0.0, -2.0]]


def test_group_std_by_hand():
    # mean 1, variance (1 + 1 + 0 + 0) / 4 with divisor G.
    found = GroupStd()(torch.tensor([[2.0, 0.0, 1.0, 1.0]]))
    scale = 1 / (math.sqrt(0.5) + 1e-6)
    assert found[0].tolist() == pytest.approx([scale, -scale, 0.0, 0.0], abs=1e-6)


def test_leave_one_out_by_hand():
    # 1 against the mean of (0, 0, 2); 0 against that of (1, 0, 2); 2 against that of (1, 0, 0).
    found = LeaveOneOut()(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    assert found[0].tolist() == pytest.approx([1 / 3, -1.0, -1.0, 5 / 3], abs=1e-6)


def judged(rewards: list[float]) -> list[float]:
    return [r for r in rewards if not math.isnan(r)]


@PROPERTY
@given(rewards=REWARDS)
def test_group_mean_agrees_with_float64(rewards):
    found = GroupMean()(torch.tensor([rewards]))[0].tolist()
    mean = sum(judged(rewards)) / max(1, len(judged(rewards)))
    assert found == pytest.approx([0.0 if math.isnan(r) else r - mean for r in rewards], abs=ATOL)


@PROPERTY
@given(rewards=REWARDS)
def test_leave_one_out_agrees_with_float64(rewards):
    expected = []
    for i, reward in enumerate(rewards):
        others = judged(rewards[:i] + rewards[i + 1 :])
        expected.append(0.0 if math.isnan(reward) or not others else reward - sum(others) / len(others))
    assert LeaveOneOut()(torch.tensor([rewards]))[0].tolist() == pytest.approx(expected, abs=ATOL)


@PROPERTY
@given(rewards=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.nan]), min_size=2, max_size=8))
def test_group_std_agrees_with_float64(rewards):
    known = judged(rewards)
    mean = sum(known) / max(1, len(known))
    std = math.sqrt(sum((r - mean) ** 2 for r in known) / max(1, len(known)))
    expected = [0.0 if math.isnan(r) else (r - mean) / (std + 1e-6) for r in rewards]
    assert GroupStd()(torch.tensor([rewards]))[0].tolist() == pytest.approx(expected, abs=ATOL)


@ALL
@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1 / 3, -7.3, 1e6 + 0.1])
@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_edge_10_equal_rewards_give_exactly_zero(kind, reward, size):
    assert kind(torch.full((2, size), reward)).abs().max() == 0


@ALL
def test_edge_10_equal_rewards_beside_an_unjudged_one_give_exactly_zero(kind):
    assert kind(torch.tensor([[0.1, math.nan, 0.1, 0.1]])).tolist() == [[0.0] * 4]


@ALL
def test_unjudged_samples_change_nothing_for_the_others(kind):
    full = kind(torch.tensor([[1.0, 0.0, 0.0]]))[0].tolist()
    found = kind(torch.tensor([[1.0, math.nan, 0.0, math.nan, 0.0]]))[0].tolist()
    assert found == pytest.approx([full[0], 0.0, full[1], 0.0, full[2]], abs=1e-6)


@ALL
def test_one_judged_sample_or_none_has_nothing_to_compare_with(kind):
    assert kind(torch.tensor([[math.nan, 5.0, math.nan], [math.nan] * 3])).abs().max() == 0


@ALL
def test_groups_do_not_see_each_other(kind):
    rewards = torch.tensor([[1.0, 0.0, 0.0], [5.0, 9.0, 2.0]])
    torch.testing.assert_close(kind(rewards), torch.cat([kind(rewards[:1]), kind(rewards[1:])]), atol=0, rtol=0)


@ALL
def test_a_group_alone_is_one_row_of_several(kind):
    rewards = torch.tensor([1.0, math.nan, 0.0, 3.0])
    torch.testing.assert_close(kind(rewards), kind(rewards[None])[0], atol=0, rtol=0)


def test_only_group_std_forgets_the_scale_of_the_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 3.0]])
    for kind in (GroupMean(), LeaveOneOut()):
        torch.testing.assert_close(kind(8 * rewards), 8 * kind(rewards), atol=0, rtol=0)
    # Up to the 1e-6 beside a standard deviation of about 1.2.
    torch.testing.assert_close(GroupStd()(8 * rewards), GroupStd()(rewards), atol=3e-6, rtol=0)


@ALL
def test_two_samples_are_the_fewest_with_an_advantage(kind):
    assert kind.min_samples == 2
    assert kind(torch.tensor([[3.0]])).tolist() == [[0.0]]
    assert kind(torch.tensor([[3.0, 1.0]]))[0, 0] > 0
