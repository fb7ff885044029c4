"""Which prompts a step takes."""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from dppo_cli.rollout.engine import derive_seed
from dppo_cli.training.files import as_count, as_number
from dppo_cli.types import Group, Prompt

LEAST = 0.01
"""Weight of a prompt that was always or never solved; p (1 - p) is 0.25 at most. So none is forgotten for good."""
FADING = 0.5
"""What earlier groups of a prompt count, each time that a new one comes: the policy has changed since."""
PRIOR = 2.0
"""How many samples the first guess of a prompt's solve rate counts for."""


class PromptOrder(Protocol):
    """Endless prompts. Two orders of one seed and equal state go on alike."""

    def take(self, count: int) -> list[Prompt]:
        """The next `count` prompts."""
        ...

    def learn(self, groups: Sequence[Group], right: Callable[[float], bool]) -> None:
        """Hear what became of the prompts of a step. `right`: whether a score counts as solved."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resume needs, as JSON."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None: ...


class Shuffled:
    """Each prompt comes once before any comes again, in an order drawn anew each time."""

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.shuffle = random.Random(seed)
        self.queue: list[Prompt] = []
        self.taken = 0

    def take(self, count: int) -> list[Prompt]:
        while len(self.queue) < count:
            self.queue += self.shuffle.sample(self.prompts, len(self.prompts))
        taken, self.queue = self.queue[:count], self.queue[count:]
        self.taken += count
        return taken

    def learn(self, groups: Sequence[Group], right: Callable[[float], bool]) -> None: ...

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.shuffle, self.queue, self.taken = random.Random(self.seed), [], 0
        # Rounds that were used up cost a shuffle each, not a prompt.
        for _ in range(state["taken"] // len(self.prompts)):
            self.shuffle.sample(range(len(self.prompts)), len(self.prompts))
            self.taken += len(self.prompts)
        self.take(state["taken"] - self.taken)


class BySolveRate:
    """Prompts are drawn in proportion to p (1 - p), p the share of right samples in their last groups.

    That is the variance of a right-or-wrong reward, to which a group's expected gradient is in proportion: none where
    every sample is right, or none is. Before a prompt's first group p is its column `solve_rate`, or 1/2.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int) -> None:
        self.prompts, self.seed = prompts, seed
        self.taken = 0
        self.seen: dict[int, tuple[float, float]] = {}  # by a prompt's number here: right and judged samples, faded
        self.number = {id(prompt): n for n, prompt in enumerate(prompts)}

    def take(self, count: int) -> list[Prompt]:
        found: list[Prompt] = []
        while len(found) < count:
            found += self._drawn(min(count - len(found), len(self.prompts)))
        return found

    def _drawn(self, count: int) -> list[Prompt]:
        """Without repetition: the largest u ** (1 / weight), u uniform (Efraimidis and Spirakis, 2006)."""
        draw = random.Random(derive_seed(self.seed, f"prompt {self.taken}"))
        keys = [draw.random() ** (1 / self._weight(n)) for n in range(len(self.prompts))]
        self.taken += count
        return [self.prompts[n] for n in sorted(range(len(keys)), key=keys.__getitem__, reverse=True)[:count]]

    def solve_rate(self, n: int) -> float:
        right, judged = self.seen.get(n, (0.0, 0.0))
        column = self.prompts[n].example.columns.get("solve_rate")
        guess = column if isinstance(column, int | float) and 0 <= column <= 1 else 0.5
        return (right + PRIOR * guess) / (judged + PRIOR)

    def _weight(self, n: int) -> float:
        p = self.solve_rate(n)
        return max(p * (1 - p), LEAST)

    def learn(self, groups: Sequence[Group], right: Callable[[float], bool]) -> None:
        for group in groups:
            values = [score.value for score in group.scores if score.value is not None]
            n = self.number[id(group.prompt)]
            old_right, old_judged = self.seen.get(n, (0.0, 0.0))
            self.seen[n] = (FADING * old_right + sum(map(right, values)), FADING * old_judged + len(values))

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "seen": [[n, *counts] for n, counts in self.seen.items()]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.taken = as_count(state["taken"])
        self.seen = {as_count(n): (as_number(right), as_number(judged)) for n, right, judged in state["seen"]}


class LookAhead:
    """An order whose prompts may be looked at before they are taken. Its state is as if they had not been."""

    def __init__(self, order: PromptOrder) -> None:
        self.order = order
        self.seen: list[Prompt] = []
        self.taken = 0  # without those

    def peek(self, count: int) -> list[Prompt]:
        """`count` prompts after those that were looked at and not taken."""
        if not self.seen:
            self.taken = as_count(self.order.state()["taken"])
        found = self.order.take(count)
        self.seen += found
        return found

    def take(self, count: int) -> list[Prompt]:
        found, self.seen = self.seen[:count], self.seen[count:]
        self.taken += len(found)
        return found + self.order.take(count - len(found))

    def learn(self, groups: Sequence[Group], right: Callable[[float], bool]) -> None:
        self.order.learn(groups, right)

    def state(self) -> dict[str, Any]:
        return {**self.order.state(), **({"taken": self.taken} if self.seen else {})}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.seen = []
        self.order.load_state(state)


ORDERS: Mapping[str, Callable[[Sequence[Prompt], int], PromptOrder]] = {
    "shuffle": Shuffled,
    "solve_rate": BySolveRate,
}
"""By the name that the key `order` has for them."""
