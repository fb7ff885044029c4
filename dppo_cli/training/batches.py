"""Which groups an update takes, and their samples."""

import random
from collections.abc import Iterator, Sequence

from dppo_cli.config.sections import BatchPlan
from dppo_cli.rollout.engine import derive_seed
from dppo_cli.types import Group, Sample


def mini_batches(groups: Sequence[Group], plan: BatchPlan, seed: int, step: int) -> Iterator[list[Group]]:
    """`prompts_per_update` groups at a time; every epoch after the first in a new order."""
    order = list(groups)
    shuffle = random.Random(derive_seed(seed, -step))
    for epoch in range(plan.epochs):
        if epoch:
            shuffle.shuffle(order)
        for start in range(0, len(order), plan.prompts_per_update):
            yield order[start : start + plan.prompts_per_update]


def samples_of(groups: Sequence[Group]) -> tuple[list[tuple[int, ...]], list[Sample]]:
    """Token ids of the groups' prompts by number, and every completion with its prompt's number."""
    prompts = [group.prompt.token_ids for group in groups]
    samples = [
        Sample(number, completion, advantage, anchor, group.kept)
        for number, group in enumerate(groups)
        for completion, advantage, anchor in zip(
            group.completions,
            group.advantages,
            [c.mu for c in group.completions] if group.anchors is None else group.anchors,
            strict=True,
        )
    ]
    return prompts, samples
