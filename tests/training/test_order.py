"""The order of prompts."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from statistics import mean

import make
import pytest

from dppo_cli.training.order import ORDERS, BySolveRate, LookAhead, Shuffled
from dppo_cli.types import Example, Group, Prompt, Score

PROMPTS = [make.prompt(i) for i in range(7)]


def right(value: float) -> bool:
    return value >= 1.0


def group(prompt: Prompt, *values: float | None) -> Group:
    return Group(prompt, [make.completion()] * len(values), [Score(value) for value in values])


def numbers(prompts: Sequence[Prompt]) -> list[int]:
    return [prompt.index for prompt in prompts]


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_every_prompt_comes_once_before_any_comes_again(size: int) -> None:
    order = Shuffled(PROMPTS, seed=4)
    batches = [numbers(order.take(size)) for _ in range(21)]
    assert all(len(batch) == size for batch in batches)
    sequence = list(itertools.chain(*batches))
    rounds = [sequence[i : i + 7] for i in range(0, len(sequence) - 6, 7)]
    assert all(sorted(one) == list(range(7)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > len(rounds) / 2, "the order is drawn anew"
    assert Counter(sequence).most_common()[0][1] <= math.ceil(len(sequence) / 7)


@pytest.mark.parametrize("name", sorted(ORDERS))
def test_the_order_of_prompts_follows_the_seed(name: str) -> None:
    def drawn(seed: int) -> list[int]:
        order = ORDERS[name](PROMPTS, seed)
        return [i for _ in range(10) for i in numbers(order.take(2))]

    assert drawn(1) == drawn(1) != drawn(2)


def test_how_many_prompts_are_taken_at_once_does_not_change_their_order() -> None:
    one, many = Shuffled(PROMPTS, seed=3), Shuffled(PROMPTS, seed=3)
    assert [one.take(1)[0] for _ in range(20)] == many.take(20)


@pytest.mark.parametrize("name", sorted(ORDERS))
@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_an_order_goes_on_from_its_state(name: str, steps: int) -> None:
    order = ORDERS[name](PROMPTS, 5)
    for step in range(steps):
        order.learn([group(prompt, 1.0, 0.0, float(step % 2)) for prompt in order.take(3)], right)
    again = ORDERS[name](PROMPTS, 5)
    again.load_state(order.state())
    assert again.state() == order.state()
    assert [numbers(again.take(4)) for _ in range(9)] == [numbers(order.take(4)) for _ in range(9)]


def test_a_snapshot_is_not_changed_by_what_comes_later() -> None:
    order = BySolveRate(PROMPTS, 5)
    order.learn([group(PROMPTS[0], 1.0, 1.0)], right)
    state = order.state()
    order.learn([group(PROMPTS[0], 0.0, 0.0), group(PROMPTS[1], 0.0)], right)
    order.take(3)
    assert state == {"taken": 0, "seen": [[0, 2.0, 2.0]]}


def test_a_solve_rate_by_hand() -> None:
    """Earlier groups count half, a first guess of 1/2 two samples; what was not judged counts nothing."""
    order = BySolveRate(PROMPTS, 5)
    assert order.solve_rate(0) == 0.5
    order.learn([group(PROMPTS[0], 1.0, 0.0, 0.5, None)], right)
    assert order.solve_rate(0) == pytest.approx((1 + 1) / (3 + 2))
    order.learn([group(PROMPTS[0], 1.0, 1.0)], right)
    assert order.solve_rate(0) == pytest.approx((0.5 + 2 + 1) / (1.5 + 2 + 2))
    assert order.solve_rate(1) == 0.5


def test_a_column_of_the_data_is_the_first_guess() -> None:
    def with_rate(rate: object) -> Prompt:
        return replace(PROMPTS[0], example=Example("1", "2", {"solve_rate": rate}))

    order = BySolveRate([with_rate(rate) for rate in (0.25, 1, None, "0.3", 7.0)], 1)
    assert [order.solve_rate(n) for n in range(5)] == [0.25, 1.0, 0.5, 0.5, 0.5]
    order.learn([Group(order.prompts[0], [make.completion()] * 2, [Score(1.0), Score(1.0)])], right)
    assert order.solve_rate(0) == pytest.approx((2 + 2 * 0.25) / 4)


def test_prompts_are_drawn_by_what_there_is_to_learn_from_them() -> None:
    """Solved, hopeless, and half solved, 100 each: expected 4 : 4 : 92 by p (1 - p) with its least value."""
    prompts = [make.prompt(i) for i in range(300)]
    order = BySolveRate(prompts, 3)
    values = {0: (1.0,) * 1000, 1: (0.0,) * 1000, 2: (1.0, 0.0) * 500}
    order.learn([group(prompt, *values[prompt.index % 3]) for prompt in prompts], right)
    drawn = Counter(i % 3 for _ in range(400) for i in numbers(order.take(5)))
    shares = [drawn[kind] / 2000 for kind in range(3)]
    assert shares == pytest.approx([0.01 / 0.27, 0.01 / 0.27, 0.25 / 0.27], abs=0.025)


def test_a_step_has_no_prompt_twice_while_there_are_enough() -> None:
    order = BySolveRate(PROMPTS, 5)
    order.learn([group(PROMPTS[0], 1.0, 0.0), *(group(p, *[0.0] * 400) for p in PROMPTS[1:])], right)
    assert all(sorted(numbers(order.take(7))) == list(range(7)) for _ in range(5))
    assert len(order.take(16)) == 16
    firsts = [order.take(1)[0].index for _ in range(200)]
    assert mean(i == 0 for i in firsts) > 0.7, "the one that teaches most comes first most often"


def test_looking_ahead_changes_nothing_but_what_comes_next() -> None:
    plain, order = Shuffled(PROMPTS, seed=4), LookAhead(Shuffled(PROMPTS, seed=4))
    expected = [plain.take(3) for _ in range(5)]
    assert order.take(3) == expected[0]
    before = order.state()
    assert order.peek(3) == expected[1] and order.peek(3) == expected[2]
    assert order.state() == before == {"taken": 3}
    assert order.take(3) == expected[1]
    assert order.state() == {"taken": 6}
    assert order.take(6) == expected[2] + expected[3]
    assert order.state() == {"taken": 12}
    order.peek(3)
    order.load_state({"taken": 3})
    assert order.take(3) == expected[1]


def test_looking_ahead_learns() -> None:
    """What is learnt after prompts were looked at is part of the state; they are not."""
    order = LookAhead(BySolveRate(PROMPTS, seed=4))
    [first] = order.take(1)
    order.peek(2)
    order.learn([group(first, 1.0, 0.0)], right)
    state = order.state()
    assert state == {"taken": 1, "seen": [[first.index, 1.0, 2.0]]}
    other = LookAhead(BySolveRate(PROMPTS, seed=4))
    other.load_state(state)
    assert other.order.solve_rate(first.index) == order.order.solve_rate(first.index)
