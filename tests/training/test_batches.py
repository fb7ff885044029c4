"""The mini-batches of a step."""

import itertools
from collections.abc import Sequence

import make

from dppo_cli.config.sections import BatchPlan
from dppo_cli.training.batches import mini_batches
from dppo_cli.types import Group


def plan(prompts_per_step: int, samples_per_prompt: int, prompts_per_update: int, epochs: int = 1) -> BatchPlan:
    return BatchPlan(prompts_per_step, samples_per_prompt, prompts_per_update, epochs)


def rollout(*sizes: int) -> list[Group]:
    """Groups of these sizes; the tokens of a response are the numbers of its group and of itself."""
    completions = [[make.completion((p, g)) for g in range(size)] for p, size in enumerate(sizes)]
    return make.groups([make.prompt(p) for p in range(len(sizes))], completions, itertools.repeat(1.0))


def numbers(part: Sequence[Group]) -> list[tuple[int, int]]:
    return [tuple(c.token_ids_T.tolist()) for group in part for c in group.completions]


def test_mini_batches_are_whole_groups_in_order():
    groups = rollout(2, 2, 2, 2, 2, 2)
    parts = list(mini_batches(groups, plan(6, 2, 3), seed=1, step=1))
    assert parts == [groups[:3], groups[3:]]
    assert [numbers(part) for part in parts] == [
        [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)],
        [(3, 0), (3, 1), (4, 0), (4, 1), (5, 0), (5, 1)],
    ]


def test_mini_batches_count_groups_whatever_their_size():
    """A collector may give fewer groups than prompts, and groups of any size."""
    parts = mini_batches(rollout(1, 3, 0, 2, 2), plan(6, 2, 2), seed=1, step=1)
    assert [numbers(part) for part in parts] == [
        [(0, 0), (1, 0), (1, 1), (1, 2)],
        [(3, 0), (3, 1)],
        [(4, 0), (4, 1)],
    ]
    assert list(mini_batches([], plan(6, 2, 2), seed=1, step=1)) == []


def test_every_epoch_sees_every_prompt_once_in_a_new_order():
    batch = plan(6, 2, 2, epochs=3)

    def cut(seed: int, step: int) -> list[list[tuple[int, int]]]:
        return [numbers(part) for part in mini_batches(rollout(2, 2, 2, 2, 2, 2), batch, seed, step)]

    parts = cut(seed=1, step=1)
    assert len(parts) == 9 == batch.updates_per_step
    orders = []
    for epoch in range(3):
        seen = list(itertools.chain(*parts[3 * epoch : 3 * epoch + 3]))
        order = [p for p, _ in seen[::2]]
        assert seen == [(p, g) for p in order for g in range(2)], "samples of a prompt stay together"
        assert sorted(order) == list(range(6))
        orders.append(order)
    assert orders[0] == list(range(6))
    assert len({tuple(order) for order in orders}) == 3
    assert cut(seed=1, step=1) == parts
    assert cut(seed=1, step=2) != parts
    assert cut(seed=2, step=1) != parts
