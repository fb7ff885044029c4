"""From prompts to scored groups: sample, score, compare the samples of a prompt."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dppo_cli.algorithm.advantage import Advantage
from dppo_cli.config.sections import BatchPlan, Sampling
from dppo_cli.reward.scorer import EarlyScorer, Scorer
from dppo_cli.rollout.engine import RolloutEngine, derive_seed, in_order
from dppo_cli.types import Completion, Group, Prompt, Score, Status

ABORTED = Score(None, note="the response was aborted")

Take = Callable[[int], Sequence[Prompt]]
"""Gives the next so many prompts."""
Generated = Iterator[tuple[int, list[Completion]]]
"""What an engine's `generate` gives."""


@dataclass(frozen=True)
class Collected:
    """What a step trains on, and what it cost.

    `replaced`: groups that were sampled and are not among `groups`. `seconds`: how long the trainer waited for sampling
    ("rollout") and scoring ("reward"). `waited`: whether that was as long as sampling took.
    """

    groups: list[Group]
    seconds: Mapping[str, float]
    replaced: Sequence[Group] = ()
    rounds: int = 1
    waited: bool = True

    @property
    def sampled(self) -> list[Group]:
        """Every group of the step."""
        return [*self.groups, *self.replaced]


class Collector(Protocol):
    """Makes groups of the next prompts. Groups may be fewer than a step's prompts, and differ in size."""

    def collect(self, take: Take, step: int) -> Collected: ...


@dataclass(frozen=True)
class InStepCollector:
    """Samples and scores while the trainer waits, so that every group is of the policy as it is.

    Groups in which every advantage is 0 are replaced by groups of the next prompts, `replacement_rounds` times at most
    (dynamic sampling, arXiv 2503.14476, Eq. 11). What is then still missing is filled up with them, so that a step
    always has the same number of groups.
    """

    engine: RolloutEngine
    scorer: Scorer
    advantage: Advantage
    batch: BatchPlan
    sampling: Sampling
    num_logprobs: int
    seed: int
    mask_truncated: bool
    replacement_rounds: int = 0

    def collect(self, take: Take, step: int) -> Collected:
        wanted = self.batch.prompts_per_step
        seconds: dict[str, float] = {}
        found: list[Group] = []
        equal: list[Group] = []
        rounds = 0
        while len(found) < wanted and rounds <= self.replacement_rounds:
            prompts = take(wanted - len(found))
            groups = self.groups(
                prompts, self.begin(prompts, step if rounds == 0 else f"{step}, round {rounds}"), seconds
            )
            rounds += 1
            if not self.replacement_rounds:
                return Collected(groups, seconds)
            for group in groups:
                (found if any(group.advantages) else equal).append(group)
        missing = wanted - len(found)
        return Collected(found + equal[:missing], seconds, equal[missing:], rounds)

    def begin(self, prompts: Sequence[Prompt], step: int | str) -> Generated:
        n, seed = self.batch.samples_per_prompt, derive_seed(self.seed, step)
        return self.engine.generate(prompts, n, self.sampling, self.num_logprobs, seed)

    def groups(self, prompts: Sequence[Prompt], generated: Generated, seconds: dict[str, float]) -> list[Group]:
        """The groups of what `begin` has begun. What was waited for is added to `seconds`."""
        found = score(generated, self.scorer, prompts)
        for name, value in found.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
        return [
            Group(prompt, completions, scores, self._advantages(completions, scores))
            for prompt, completions, scores in zip(prompts, found.completions, found.scores, strict=True)
        ]

    def _advantages(self, completions: Sequence[Completion], scores: Sequence[Score]) -> list[float]:
        found = advantages(scores, self.advantage)
        if self.mask_truncated:
            found = [0.0 if c.status is Status.CUT else a for c, a in zip(completions, found, strict=True)]
        return found


@dataclass(frozen=True)
class Scored:
    """Completions and scores of each prompt, in the order of the prompts. `seconds`: as in `Collected`."""

    completions: list[list[Completion]]
    scores: list[list[Score]]
    seconds: Mapping[str, float]


def sample_and_score(
    engine: RolloutEngine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    sampling: Sampling,
    num_logprobs: int,
    seed: int,
) -> Scored:
    """Sample, and score; see `score`."""
    return score(engine.generate(prompts, samples_per_prompt, sampling, num_logprobs, seed), scorer, prompts)


def score(generated: Generated, scorer: Scorer, prompts: Sequence[Prompt]) -> Scored:
    """Score all in one call. A scorer that can begins with each group while the others are sampled."""
    early = scorer if isinstance(scorer, EarlyScorer) else None
    start, scoring = time.perf_counter(), 0.0
    found: list[tuple[int, list[Completion]]] = []
    try:
        for number, completions in generated:
            found.append((number, completions))
            if early is not None:
                begun_at = time.perf_counter()
                early.begin(prompts[number], completions)
                scoring += time.perf_counter() - begun_at
        sampled_at = time.perf_counter()
        sampled = in_order(found)
        scores = scorer(prompts, sampled)
    except BaseException:
        if early is not None:
            early.give_up()
        raise
    seconds = {"rollout": sampled_at - start - scoring, "reward": scoring + time.perf_counter() - sampled_at}
    scores = [_without_aborted(*group) for group in zip(sampled, scores, strict=True)]
    return Scored(sampled, scores, seconds)


def _without_aborted(completions: Sequence[Completion], scores: list[Score]) -> list[Score]:
    """What broke off is not judged, whatever the scorer makes of it."""
    if all(completion.status is not Status.ABORTED for completion in completions):
        return scores
    return [ABORTED if c.status is Status.ABORTED else score for c, score in zip(completions, scores, strict=True)]


def advantages(scores: Sequence[Score], advantage: Advantage) -> list[float]:
    """The advantage of each sample over the others of its prompt; 0 for one that was not judged."""
    if not scores:
        return []
    rewards = [math.nan if score.value is None else score.value for score in scores]
    return advantage(torch.tensor(rewards, dtype=torch.float32)).tolist()
