"""Which prompts a step takes, and which groups an update takes."""

import random
from collections.abc import Iterator, Sequence

from dppo_cli.config.sections import BatchPlan
from dppo_cli.rollout.collect import derive_seed
from dppo_cli.types import Group, Prompt


class PromptOrder:
    """Endless prompts: each comes once before any comes again, in an order drawn anew each time.

    `taken` is the data cursor: two orders of one seed that have given equally many prompts go on alike.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, taken: int = 0) -> None:
        self.prompts = prompts
        self.seed, self.shuffle = seed, random.Random(seed)
        self.queue: list[Prompt] = []
        self.taken = 0
        # Rounds that were used up cost a shuffle each, not a prompt.
        for _ in range(taken // len(prompts)):
            self.shuffle.sample(range(len(prompts)), len(prompts))
            self.taken += len(prompts)
        self.take(taken - self.taken)

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        while len(self.queue) < count:
            self.queue += self.shuffle.sample(self.prompts, len(self.prompts))
        taken, self.queue = self.queue[:count], self.queue[count:]
        self.taken += count
        return taken


def mini_batches(groups: Sequence[Group], plan: BatchPlan, seed: int, step: int) -> Iterator[list[Group]]:
    """`prompts_per_update` groups at a time; every epoch after the first in a new order."""
    order = list(groups)
    shuffle = random.Random(derive_seed(seed, -step))
    for epoch in range(plan.epochs):
        if epoch:
            shuffle.shuffle(order)
        for start in range(0, len(order), plan.prompts_per_update):
            yield order[start : start + plan.prompts_per_update]
