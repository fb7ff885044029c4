"""From prompts to scored groups: advantages, seeds, and the collector that samples while the trainer waits."""

import itertools
from collections.abc import Callable, Iterator, Sequence

import make
import pytest

from dppo_cli.algorithm.advantage import Advantage, GroupMean, LeaveOneOut
from dppo_cli.config.sections import BatchPlan, Sampling
from dppo_cli.errors import RewardError
from dppo_cli.rollout.collect import InStepCollector, Take, advantages
from dppo_cli.rollout.engine import derive_seed
from dppo_cli.types import Completion, Group, Prompt, Score, Status

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=8, stop=[])


def scores(*values: float | None) -> list[Score]:
    return [Score(value) for value in values]


def given(prompts: Sequence[Prompt]) -> Take:
    """Takes those."""

    def take(count: int) -> Sequence[Prompt]:
        assert count == len(prompts)
        return prompts

    return take


class Engine:
    """Remembers what it was asked; gives each prompt the completions that it has for it."""

    def __init__(self, completions: Sequence[Sequence[Completion]]) -> None:
        self.completions = [list(row) for row in completions]
        self.asked: list[tuple[object, ...]] = []

    def generate(self, *asked: object) -> Iterator[tuple[int, list[Completion]]]:
        """The last prompt's end first."""
        self.asked.append(asked)
        return reversed(list(enumerate(self.completions)))


def collector(
    engine: Engine, values: Sequence[Sequence[float | None]], advantage: Advantage, truncated: bool = False
) -> InStepCollector:
    """With a scorer that gives these values, a list for each prompt. `truncated`: cut responses are masked."""

    def score(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        assert [list(row) for row in completions] == engine.completions
        assert len(prompts) == len(completions)
        return [scores(*row) for row in values]

    plan = BatchPlan(len(engine.completions), 3, 1, 1)
    return InStepCollector(engine, score, advantage, plan, SAMPLING, num_logprobs=5, seed=9, mask_truncated=truncated)


def sampled(*sizes: int) -> tuple[list[Prompt], list[list[Completion]]]:
    completions = [[make.completion((p, g)) for g in range(size)] for p, size in enumerate(sizes)]
    return [make.prompt(p) for p in range(len(sizes))], completions


def test_an_advantage_compares_the_samples_of_one_prompt():
    prompts, completions = sampled(3, 3)
    engine = Engine(completions)
    groups = (
        collector(engine, [[1.0, 0.0, 0.5], [10.0, 10.0, 40.0]], GroupMean()).collect(given(prompts), step=1).groups
    )
    assert [a for group in groups for a in group.advantages] == pytest.approx([0.5, -0.5, 0.0, -10.0, -10.0, 20.0])
    assert [[s.value for s in group.scores] for group in groups] == [[1.0, 0.0, 0.5], [10.0, 10.0, 40.0]]
    assert [group.completions for group in groups] == completions
    assert [group.prompt for group in groups] == prompts
    assert all(group.anchors is None for group in groups), "mu is the anchor"


def test_a_sample_that_was_not_judged_has_no_advantage():
    assert advantages(scores(1.0, None, 0.0), GroupMean()) == pytest.approx([0.5, 0.0, -0.5])
    assert advantages(scores(None, None, 5.0), GroupMean()) == pytest.approx([0.0, 0.0, 0.0])
    assert advantages(scores(None, None), GroupMean()) == [0.0, 0.0]


def test_a_score_that_was_not_judged_stays_so():
    """None is neither zero nor NaN."""
    prompts, completions = sampled(2)
    (group,) = collector(Engine(completions), [[1.0, None]], GroupMean()).collect(given(prompts), step=1).groups
    assert [s.value for s in group.scores] == [1.0, None]
    assert group.advantages == [0.0, 0.0]


def test_the_advantage_is_the_one_that_was_chosen():
    assert advantages(scores(1.0, 0.0, 0.0), LeaveOneOut()) == pytest.approx([1.0, -0.5, -0.5])
    prompts, completions = sampled(3)
    (group,) = collector(Engine(completions), [[1.0, 0.0, 0.0]], LeaveOneOut()).collect(given(prompts), step=1).groups
    assert group.advantages == pytest.approx([1.0, -0.5, -0.5])


def test_responses_that_were_cut_are_masked_where_asked():
    """They have no advantage, and still count in the mean of their group."""
    prompts = [make.prompt(0)]
    rows = [[make.completion(), make.completion(status=Status.CUT), make.completion()]]
    for truncated, expected in ((False, [0.5, -1.0, 0.5]), (True, [0.5, 0.0, 0.5])):
        collects = collector(Engine(rows), [[1.5, 0.0, 1.5]], GroupMean(), truncated)
        (group,) = collects.collect(given(prompts), step=1).groups
        assert group.advantages == pytest.approx(expected)


def test_groups_differ_in_size_where_the_engine_lost_completions():
    prompts, completions = sampled(1, 3, 0)
    found = collector(Engine(completions), [[2.0], [1.0, 0.0, 2.0], []], GroupMean()).collect(given(prompts), step=1)
    assert [list(group.advantages) for group in found.groups] == [[0.0], [0.0, -1.0, 1.0], []]
    assert advantages([], LeaveOneOut()) == []
    assert advantages(scores(3.0), LeaveOneOut()) == [0.0]


def test_the_engine_is_asked_for_what_the_config_says():
    """With a seed of the step's own, so that a rollout depends on nothing that was sampled before."""
    prompts, completions = sampled(3, 3)
    engine = Engine(completions)
    collects = collector(engine, [[1.0, 0.0, 0.0]] * 2, GroupMean())
    for step in (1, 2):
        seconds = collects.collect(given(prompts), step).seconds
        assert set(seconds) == {"rollout", "reward"}
        assert min(seconds.values()) >= 0
    assert engine.asked == [(prompts, 3, SAMPLING, 5, derive_seed(9, step)) for step in (1, 2)]


class Sums:
    """An engine whose completions carry the number of their prompt and of the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int]] = []

    def generate(self, prompts: Sequence[Prompt], n: int, *asked: object) -> Iterator[tuple[int, list[Completion]]]:
        self.calls.append(([prompt.index for prompt in prompts], asked[-1]))
        return enumerate([make.completion((prompt.index, g)) for g in range(n)] for prompt in prompts)


def replacing(rounds: int, teaches: Callable[[int], bool], wanted: int = 4) -> tuple[InStepCollector, Sums, Take]:
    """A collector whose prompts, numbered from 0 on, give differing rewards where `teaches` says so."""

    def score(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        return [scores(1.0, 0.0 if teaches(prompt.index) else 1.0) for prompt in prompts]

    engine, numbers = Sums(), itertools.count()

    def take(count: int) -> list[Prompt]:
        return [make.prompt(next(numbers)) for _ in range(count)]

    plan = BatchPlan(wanted, 2, wanted, 1)
    return InStepCollector(engine, score, GroupMean(), plan, SAMPLING, 0, 9, False, rounds), engine, take


def indices(groups: Sequence[Group]) -> list[int]:
    return [group.prompt.index for group in groups]


def test_groups_of_equal_rewards_are_replaced_by_groups_of_the_next_prompts():
    collects, engine, take = replacing(5, teaches=lambda i: i % 3 == 0)
    found = collects.collect(take, step=2)
    # 0 and 3 of the first four, 4 and 5 teach nothing, then 6, then 7 and 8 do not, 9 does.
    assert indices(found.groups) == [0, 3, 6, 9]
    assert indices(found.replaced) == [1, 2, 4, 5, 7, 8]
    assert indices(found.sampled) == [0, 3, 6, 9, 1, 2, 4, 5, 7, 8]
    assert [prompts for prompts, _ in engine.calls] == [[0, 1, 2, 3], [4, 5], [6, 7], [8], [9]]
    assert found.rounds == 5
    seeds = [seed for _, seed in engine.calls]
    assert seeds[0] == derive_seed(9, 2) and len(set(seeds)) == 5, "each round has a seed of its own"


def test_replacing_ends_after_so_many_rounds_and_fills_up():
    collects, engine, take = replacing(2, teaches=lambda i: i == 1)
    found = collects.collect(take, step=1)
    assert [prompts for prompts, _ in engine.calls] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert indices(found.groups) == [1, 0, 2, 3], "a step always has the same number of groups"
    assert indices(found.replaced) == [4, 5, 6, 7, 8, 9]
    assert found.rounds == 3
    assert all(seconds >= 0 for seconds in found.seconds.values())


def test_nothing_is_replaced_where_it_was_not_asked_for():
    collects, engine, take = replacing(0, teaches=lambda i: False)
    found = collects.collect(take, step=1)
    assert (indices(found.groups), found.replaced, found.rounds, len(engine.calls)) == ([0, 1, 2, 3], (), 1, 1)


def test_a_step_that_teaches_at_once_is_sampled_once():
    collects, engine, take = replacing(3, teaches=lambda i: True)
    assert collects.collect(take, step=1).rounds == len(engine.calls) == 1


def test_a_reward_that_fails_ends_the_step():
    def score(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        raise RewardError("no idea")

    prompts, completions = sampled(2)
    failing = InStepCollector(
        Engine(completions), score, GroupMean(), BatchPlan(1, 2, 1, 1), SAMPLING, 0, seed=1, mask_truncated=False
    )
    with pytest.raises(RewardError, match="no idea"):
        failing.collect(given(prompts), step=1)


def test_derived_seeds():
    seeds = {(seed, step): derive_seed(seed, step) for seed in range(20) for step in range(-50, 50)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds.values())
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1, 1) == seeds[1, 1] == 4248681368535603445, "another seed would make old runs unrepeatable"
