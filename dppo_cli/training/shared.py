"""Training in several processes: each has a learner of its own, and a share of an update's groups."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dppo_cli.errors import NumericalError
from dppo_cli.policy.policy import Policy
from dppo_cli.processes.crew import ENDING, Crew
from dppo_cli.training.batches import samples_of
from dppo_cli.training.learner import Learner
from dppo_cli.training.trainer import UpdateResult
from dppo_cli.types import Completion, Group, PolicyReport, SampleStats, TokenStats


class SharedLearner:
    """See `Trainer`. `learner`: of this process; the workers answer with theirs (`WorkersLearner`).

    The gradient is that of one process but for the order of its sum: all parts are divided by the same number.
    """

    def __init__(self, learner: Learner, crew: Crew) -> None:
        self.learner, self.crew = learner, crew

    @property
    def policy(self) -> Policy:
        return self.learner.policy

    @property
    def warn(self) -> Callable[[str], None]:
        return self.learner.warn

    def anchored(self, groups: Sequence[Group]) -> list[Group]:
        own, *others = self._parts(groups, every=True)
        self.crew.begin("anchors", [(_of(groups, part), seed) for part, seed in self._with_seeds(others)])
        anchored = list(groups)
        for number, group in zip(own, self.learner.anchored(_of(groups, own)), strict=True):
            anchored[number] = group
        for part, found in zip(others, self.crew.ended(), strict=True):
            for number, anchors in zip(part, found, strict=True):
                anchored[number] = replace(groups[number], anchors=anchors)
        return anchored

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        own, *others = self._parts(groups, every=self.learner.loss.needs_all_tokens)
        divisor = self.learner.divisor(groups)
        how = (divisor, self.learner.budget)
        self.crew.begin("gradient", [(_of(groups, part), seed, *how) for part, seed in self._with_seeds(others)])
        try:
            results = [self.learner.gradient(_of(groups, own), divisor)]
            for (result, kept, budget), part in zip(self.crew.ended(), others, strict=True):
                results.append(_of_main(result, kept, _of(groups, part)))
                self.learner.budget = min(self.learner.budget, budget)
            self.crew.begin_all("step")
            norm = self.learner.step(self.crew.check)
            self.crew.ended()
        except NumericalError:
            self.learner.drop_gradient()
            self.crew.begin_all("drop_gradient")
            self.crew.ended()
            raise
        except RuntimeError:
            # A sum fails if a process of it ends, and its line tells it in words.
            self.crew.check(ENDING)
            raise
        return replace(_joined(results), gradient_norm=norm)

    def skipped(self, groups: Sequence[Group]) -> UpdateResult:
        self.crew.begin_all("skipped")
        result = self.learner.skipped(groups)
        self.crew.ended()
        return result

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.learner.state()

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        """Of this process alone. Workers get a state before their first update; a run goes back to one when it ends."""
        self.learner.load_state(tensors, plain)

    def _parts(self, groups: Sequence[Group], *, every: bool) -> list[list[int]]:
        """The numbers of each process's groups. `every`: samples without advantage run, too."""
        return balanced([tokens(group, every=every) for group in groups], self.crew.size)

    def _with_seeds(self, parts: list[list[int]]) -> list[tuple[list[int], int]]:
        """Each with a seed for dropout. Drawn here, because a checkpoint has the random state of this process alone."""
        return list(zip(parts, torch.randint(2**62, (len(parts),)).tolist(), strict=True))


class WorkersLearner:
    """A worker's side: the learner of its process, asked by the main one."""

    def __init__(self, learner: Learner) -> None:
        self.learner = learner

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        self.learner.load_state(tensors, plain)

    def anchors(self, groups: Sequence[Group], seed: int) -> list[Sequence[PolicyReport] | None]:
        torch.manual_seed(seed)
        return [group.anchors for group in self.learner.anchored(groups)]

    def gradient(
        self, groups: Sequence[Group], seed: int, divisor: float, budget: int
    ) -> tuple[UpdateResult, list[int], int]:
        """With the numbers of its kept samples among all of the groups', and what `budget` has come to."""
        torch.manual_seed(seed)
        self.learner.budget = budget
        result = self.learner.gradient(groups, divisor)
        number = {id(completion): n for n, completion in enumerate(_completions(groups))}
        of_kept = [number[id(stats.completion)] for stats in result.kept]
        return result, of_kept, self.learner.budget

    def step(self) -> None:
        self.learner.step()

    def drop_gradient(self) -> None:
        self.learner.drop_gradient()

    def skipped(self) -> None:
        self.learner.skipped([])


def tokens(group: Group, *, every: bool) -> int:
    """That run through the model: of the samples that have a gradient, or of all, and of the prompt once."""
    samples = zip(group.completions, group.advantages, strict=True)
    of_samples = sum(len(c.token_ids_T) for c, advantage in samples if every or advantage != 0)
    return of_samples + len(group.prompt.token_ids) if of_samples else 0


def balanced(loads: Sequence[int], parts: int) -> list[list[int]]:
    """The numbers of things with such loads in `parts` parts: the heaviest first, each to the part with the least load.

    Every part is in the order of the numbers, and among equal parts the one with fewer things comes first.

    Example:
        >>> balanced([5, 1, 4, 3], 2)
        [[0, 1], [2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    total = [0] * parts
    for number in sorted(range(len(loads)), key=lambda n: (-loads[n], n)):
        part = min(range(parts), key=lambda p: (total[p], len(found[p]), p))
        found[part].append(number)
        total[part] += loads[number]
    return [sorted(part) for part in found]


def _of(groups: Sequence[Group], part: Sequence[int]) -> list[Group]:
    return [groups[number] for number in part]


def _completions(groups: Sequence[Group]) -> list[Completion]:
    return [sample.completion for sample in samples_of(groups)[1]]


def _of_main(result: UpdateResult, numbers: Sequence[int], groups: Sequence[Group]) -> UpdateResult:
    """A worker's result with the completions of this process in it, which others know by their identity."""
    completions = _completions(groups)
    kept = zip(result.kept, numbers, strict=True)
    return replace(result, kept=[replace(stats, completion=completions[number]) for stats, number in kept])


def _joined(results: Sequence[UpdateResult]) -> UpdateResult:
    """As if one process had done all."""
    stats: list[TokenStats] = [part for result in results for part in result.stats]
    kept: list[SampleStats] = [part for result in results for part in result.kept]
    return UpdateResult(
        stats=stats,
        kept=kept,
        gradient_norm=None,
        lr=results[0].lr,
        sequences=sum(result.sequences for result in results),
        skipped_sequences=sum(result.skipped_sequences for result in results),
        num_positions=sum(result.num_positions for result in results),
        num_padding=sum(result.num_padding for result in results),
    )
