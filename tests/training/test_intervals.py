"""Bootstrap intervals, against closed forms and by how often they hold the truth."""

import math
import random

import pytest

from dppo_cli.training import intervals
from dppo_cli.training.intervals import Difference, accuracy_interval, paired_difference


def test_an_interval_of_many_problems_is_that_of_the_normal_distribution() -> None:
    """400 problems of one sample, 30% right: p ± 1.96 sqrt(p (1 - p) / n), to within the noise of the draws."""
    right = [1.0] * 120 + [0.0] * 280
    interval = accuracy_interval(right, [1.0] * 400)
    assert interval is not None
    half = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert interval == pytest.approx((0.3 - half, 0.3 + half), abs=0.004)
    assert accuracy_interval(right, [1.0] * 400) == interval, "equal results have equal intervals"


def test_copies_of_samples_make_no_interval_shorter() -> None:
    right = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert accuracy_interval([8 * r for r in right], [8.0] * 5) == accuracy_interval(right, [1.0] * 5)


def test_problems_with_more_judged_samples_count_for_more() -> None:
    interval = accuracy_interval([10.0, 0.0], [10.0, 1.0])
    assert interval == (0.0, 1.0), "either problem may be drawn twice"
    many = accuracy_interval([10.0, 0.0] * 500, [10.0, 1.0] * 500)
    assert many is not None and many[0] < 10 / 11 < many[1]
    assert many[1] - many[0] < 0.025


def test_too_few_problems_have_no_interval() -> None:
    assert accuracy_interval([], []) is None
    assert accuracy_interval([1.0], [1.0]) is None
    assert accuracy_interval([1.0, 2.0], [2.0, 4.0]) is None, "both half solved: nothing to draw from"


def test_where_all_problems_are_alike_the_interval_is_the_exact_one() -> None:
    """None of 4 solved: as likely as 2.5% if the accuracy were 60.2%."""
    high = 1 - 0.025**0.25
    assert accuracy_interval([0.0] * 4, [1.0] * 4) == (0.0, pytest.approx(high))
    assert (1 - high) ** 4 == pytest.approx(0.025)
    assert accuracy_interval([3.0, 1.0, 1.0, 2.0], [3.0, 1.0, 1.0, 2.0]) == (pytest.approx(1 - high), 1.0)
    assert paired_difference([0.0, 1.0], [0.0, 1.0]) == Difference(0.0, None, 2)


def test_few_at_a_time_are_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = [tuple(drawn.shape) for drawn in intervals._drawn(1000)]
    assert seen == [(4000, 1000)]
    monkeypatch.setattr(intervals, "AT_ONCE", 2500)
    shapes = [tuple(drawn.shape) for drawn in intervals._drawn(1000)]
    assert set(shapes) == {(2, 1000)} and len(shapes) == 2000
    assert next(tuple(d.shape) for d in intervals._drawn(10_000)) == (1, 10_000)


def test_an_interval_holds_the_truth_about_19_times_of_20() -> None:
    draw = random.Random(1)
    held = 0
    for _ in range(200):
        right = [float(draw.random() < 0.4) for _ in range(80)]
        interval = accuracy_interval(right, [1.0] * 80)
        assert interval is not None
        held += interval[0] <= 0.4 <= interval[1]
    assert 180 <= held <= 199  # of 200; 190 ± 3 are expected


def test_a_paired_difference_by_hand() -> None:
    before, after = [0.0, 0.5, 1.0, None, 0.25], [1.0, 0.5, 0.5, 1.0, None]
    found = paired_difference(before, after)
    assert found is not None and found.mean == pytest.approx((1.0 + 0.0 - 0.5) / 3) and found.problems == 3
    assert found.interval is not None and found.interval[0] < found.mean < found.interval[1]
    assert paired_difference([None, 1.0], [1.0, None]) is None
    assert paired_difference([0.0], [1.0]) == Difference(1.0, None, 1)
    with pytest.raises(ValueError, match="longer"):
        paired_difference([0.0], [1.0, 1.0])


def test_pairing_removes_what_is_hard_for_both() -> None:
    """Half of the problems are hopeless, half easy; on every tenth the second is better."""
    before = [float(n % 2) for n in range(200)]
    after = [1.0 if n % 20 == 0 else before[n] for n in range(200)]
    paired = paired_difference(before, after)
    alone = accuracy_interval(after, [1.0] * 200)
    assert paired is not None and paired.interval is not None and alone is not None
    assert paired.mean == pytest.approx(0.05)
    assert paired.interval[0] > 0.015
    assert paired.interval[1] - paired.interval[0] < (alone[1] - alone[0]) / 2
