"""From prompts to scored groups: advantages, seeds, and the collector that samples while the trainer waits."""

from collections.abc import Sequence

import make
import pytest

from dppo_cli.algorithm.advantage import Advantage, GroupMean, LeaveOneOut
from dppo_cli.config.sections import Sampling
from dppo_cli.errors import RewardError
from dppo_cli.rollout.collect import InStepCollector, advantages, derive_seed
from dppo_cli.types import Completion, Prompt, Score, Status

SAMPLING = Sampling(temperature=0.7, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=8, stop=[])


def scores(*values: float | None) -> list[Score]:
    return [Score(value) for value in values]


class Engine:
    """Remembers what it was asked; gives each prompt the completions that it has for it."""

    def __init__(self, completions: Sequence[Sequence[Completion]]) -> None:
        self.completions = [list(row) for row in completions]
        self.asked: list[tuple[object, ...]] = []

    def generate(self, *asked: object) -> list[list[Completion]]:
        self.asked.append(asked)
        return self.completions


def collector(
    engine: Engine, values: Sequence[Sequence[float | None]], advantage: Advantage, truncated: bool = False
) -> InStepCollector:
    """With a scorer that gives these values, a list for each prompt. `truncated`: cut responses are masked."""

    def score(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        assert [list(row) for row in completions] == engine.completions
        assert len(prompts) == len(completions)
        return [scores(*row) for row in values]

    return InStepCollector(engine, score, advantage, 3, SAMPLING, num_logprobs=5, seed=9, mask_truncated=truncated)


def sampled(*sizes: int) -> tuple[list[Prompt], list[list[Completion]]]:
    completions = [[make.completion((p, g)) for g in range(size)] for p, size in enumerate(sizes)]
    return [make.prompt(p) for p in range(len(sizes))], completions


def test_an_advantage_compares_the_samples_of_one_prompt():
    prompts, completions = sampled(3, 3)
    engine = Engine(completions)
    groups = collector(engine, [[1.0, 0.0, 0.5], [10.0, 10.0, 40.0]], GroupMean()).collect(prompts, step=1).groups
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
    (group,) = collector(Engine(completions), [[1.0, None]], GroupMean()).collect(prompts, step=1).groups
    assert [s.value for s in group.scores] == [1.0, None]
    assert group.advantages == [0.0, 0.0]


def test_the_advantage_is_the_one_that_was_chosen():
    assert advantages(scores(1.0, 0.0, 0.0), LeaveOneOut()) == pytest.approx([1.0, -0.5, -0.5])
    prompts, completions = sampled(3)
    (group,) = collector(Engine(completions), [[1.0, 0.0, 0.0]], LeaveOneOut()).collect(prompts, step=1).groups
    assert group.advantages == pytest.approx([1.0, -0.5, -0.5])


def test_responses_that_were_cut_are_masked_where_asked():
    """They have no advantage, and still count in the mean of their group."""
    prompts = [make.prompt(0)]
    rows = [[make.completion(), make.completion(status=Status.CUT), make.completion()]]
    for truncated, expected in ((False, [0.5, -1.0, 0.5]), (True, [0.5, 0.0, 0.5])):
        collects = collector(Engine(rows), [[1.5, 0.0, 1.5]], GroupMean(), truncated)
        (group,) = collects.collect(prompts, step=1).groups
        assert group.advantages == pytest.approx(expected)


def test_groups_differ_in_size_where_the_engine_lost_completions():
    prompts, completions = sampled(1, 3, 0)
    found = collector(Engine(completions), [[2.0], [1.0, 0.0, 2.0], []], GroupMean()).collect(prompts, step=1)
    assert [list(group.advantages) for group in found.groups] == [[0.0], [0.0, -1.0, 1.0], []]
    assert advantages([], LeaveOneOut()) == []
    assert advantages(scores(3.0), LeaveOneOut()) == [0.0]


def test_the_engine_is_asked_for_what_the_config_says():
    """With a seed of the step's own, so that a rollout depends on nothing that was sampled before."""
    prompts, completions = sampled(3, 3)
    engine = Engine(completions)
    collects = collector(engine, [[1.0, 0.0, 0.0]] * 2, GroupMean())
    for step in (1, 2):
        seconds = collects.collect(prompts, step).seconds
        assert set(seconds) == {"rollout", "reward"}
        assert min(seconds.values()) >= 0
    assert engine.asked == [(prompts, 3, SAMPLING, 5, derive_seed(9, step)) for step in (1, 2)]


def test_a_reward_that_fails_ends_the_step():
    def score(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        raise RewardError("no idea")

    prompts, completions = sampled(2)
    failing = InStepCollector(Engine(completions), score, GroupMean(), 2, SAMPLING, 0, seed=1, mask_truncated=False)
    with pytest.raises(RewardError, match="no idea"):
        failing.collect(prompts, step=1)


def test_derived_seeds():
    seeds = {(seed, step): derive_seed(seed, step) for seed in range(20) for step in range(-50, 50)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds.values())
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1, 1) == seeds[1, 1] == 4248681368535603445, "another seed would make old runs unrepeatable"
