"""The loop's small parts: advantages, mini-batches, the order of prompts, seeds."""

import itertools
import math
from collections import Counter
from dataclasses import replace

import make
import pytest

from dppo_cli.sections import BatchPlan
from dppo_cli.train import derive_seed, mini_batches, prompt_batches, score
from dppo_cli.types import Prompt

PROMPTS = [Prompt(i, f"p{i}", (3,), "", {}) for i in range(7)]


@pytest.fixture
def plan(train_config):
    """A config with the given batch plan."""

    def planned(prompts_per_step: int, samples_per_prompt: int, prompts_per_update: int, epochs: int = 1):
        batch = BatchPlan(prompts_per_step, samples_per_prompt, prompts_per_update, epochs)
        return replace(train_config(), batch=batch)

    return planned


def rollout(prompts: int, group: int):
    completions = [make.completion(index=p, token_ids=(p, g)) for p in range(prompts) for g in range(group)]
    return make.samples(completions, [1.0] * len(completions))


def test_an_advantage_compares_the_samples_of_one_prompt(plan):
    completions = [s.completion for s in rollout(2, 3)]
    samples = score(completions, [1.0, 0.0, 0.5, 10.0, 10.0, 40.0], plan(2, 3, 1))
    assert [s.advantage for s in samples] == pytest.approx([0.5, -0.5, 0.0, -10.0, -10.0, 20.0])
    assert [s.reward for s in samples] == [1.0, 0.0, 0.5, 10.0, 10.0, 40.0]
    assert [s.completion for s in samples] == completions
    assert all(s.anchor is s.completion.mu for s in samples)


def test_a_sample_that_was_not_judged_has_no_advantage(plan):
    samples = score([s.completion for s in rollout(2, 3)], [1.0, math.nan, 0.0, math.nan, math.nan, 5.0], plan(2, 3, 1))
    assert [s.advantage for s in samples] == pytest.approx([0.5, 0.0, -0.5, 0.0, 0.0, 0.0])
    assert math.isnan(samples[1].reward)


def test_the_advantage_is_the_configs(train_config, plan):
    config = replace(plan(1, 3, 1), advantage=train_config("advantage=leave_one_out").advantage)
    samples = score([s.completion for s in rollout(1, 3)], [1.0, 0.0, 0.0], config)
    assert [s.advantage for s in samples] == pytest.approx([1.0, -0.5, -0.5])


def places(part) -> list[tuple[int, int]]:
    return [tuple(s.completion.token_ids_T.tolist()) for s in part]


def test_mini_batches_are_whole_prompts_in_order(plan):
    parts = list(mini_batches(rollout(6, 2), plan(6, 2, 3), step=1))
    assert [places(part) for part in parts] == [
        [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)],
        [(3, 0), (3, 1), (4, 0), (4, 1), (5, 0), (5, 1)],
    ]


def test_every_epoch_sees_every_prompt_once_in_a_new_order(plan):
    config = plan(6, 2, 2, epochs=3)
    parts = [places(part) for part in mini_batches(rollout(6, 2), config, step=1)]
    assert len(parts) == 9 == config.batch.updates_per_step
    orders = []
    for epoch in range(3):
        seen = list(itertools.chain(*parts[3 * epoch : 3 * epoch + 3]))
        order = [p for p, _ in seen[::2]]
        assert seen == [(p, g) for p in order for g in range(2)], "samples of a prompt stay together"
        assert sorted(order) == list(range(6))
        orders.append(order)
    assert orders[0] == list(range(6))
    assert len({tuple(order) for order in orders}) == 3
    again = [places(part) for part in mini_batches(rollout(6, 2), config, step=1)]
    other_step = [places(part) for part in mini_batches(rollout(6, 2), config, step=2)]
    other_seed = [places(part) for part in mini_batches(rollout(6, 2), replace(config, seed=2), step=1)]
    assert again == parts
    assert other_step != parts
    assert other_seed != parts


@pytest.mark.parametrize("size", [1, 3, 7, 10])
def test_every_prompt_comes_once_before_any_comes_again(size):
    drawn = itertools.islice(prompt_batches(PROMPTS, size, seed=4), 21)
    batches = [[p.index for p in batch] for batch in drawn]
    assert all(len(batch) == size for batch in batches)
    sequence = list(itertools.chain(*batches))
    rounds = [sequence[i : i + 7] for i in range(0, len(sequence) - 6, 7)]
    assert all(sorted(one) == list(range(7)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > len(rounds) / 2, "the order is drawn anew"
    assert Counter(sequence).most_common()[0][1] <= math.ceil(len(sequence) / 7)


def test_the_order_of_prompts_follows_the_seed():
    first, again, other = (
        [p.index for batch in itertools.islice(prompt_batches(PROMPTS, 2, seed), 10) for p in batch]
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_derived_seeds():
    seeds = {(seed, step): derive_seed(seed, step) for seed in range(20) for step in range(-50, 50)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds.values())
    assert derive_seed(1, 23) != derive_seed(12, 3)
    assert derive_seed(1, 1) == seeds[1, 1] == 4248681368535603445, "another seed would make old runs unrepeatable"
