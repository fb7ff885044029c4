"""From prompts to scored groups: sample, score, compare the samples of a prompt."""

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dppo_cli.algorithm.advantage import Advantage
from dppo_cli.config.sections import Sampling
from dppo_cli.reward.scorer import Scorer
from dppo_cli.rollout.engine import RolloutEngine
from dppo_cli.types import Completion, Group, Prompt, Score, Status


@dataclass(frozen=True)
class Collected:
    """The groups of a step, and the seconds that the trainer waited for sampling ("rollout") and scoring ("reward")."""

    groups: list[Group]
    seconds: Mapping[str, float]


class Collector(Protocol):
    """Turns the prompts of a step into groups. Groups may be fewer or more than the prompts, and differ in size."""

    def collect(self, prompts: Sequence[Prompt], step: int) -> Collected: ...


@dataclass(frozen=True)
class InStepCollector:
    """Samples and scores while the trainer waits, so that every group is of the policy as it is."""

    engine: RolloutEngine
    scorer: Scorer
    advantage: Advantage
    samples_per_prompt: int
    sampling: Sampling
    num_logprobs: int
    seed: int
    mask_truncated: bool

    def collect(self, prompts: Sequence[Prompt], step: int) -> Collected:
        start = time.perf_counter()
        seed = derive_seed(self.seed, step)
        sampled = self.engine.generate(prompts, self.samples_per_prompt, self.sampling, self.num_logprobs, seed)
        sampled_at = time.perf_counter()
        scores = self.scorer(prompts, sampled)
        groups = [
            Group(prompt, completions, of_prompt, self._advantages(completions, of_prompt))
            for prompt, completions, of_prompt in zip(prompts, sampled, scores, strict=True)
        ]
        return Collected(groups, {"rollout": sampled_at - start, "reward": time.perf_counter() - sampled_at})

    def _advantages(self, completions: Sequence[Completion], scores: Sequence[Score]) -> list[float]:
        found = advantages(scores, self.advantage)
        if self.mask_truncated:
            found = [0.0 if c.status is Status.CUT else a for c, a in zip(completions, found, strict=True)]
        return found


def advantages(scores: Sequence[Score], advantage: Advantage) -> list[float]:
    """The advantage of each sample over the others of its prompt; 0 for one that was not judged."""
    if not scores:
        return []
    rewards = [math.nan if score.value is None else score.value for score in scores]
    return advantage(torch.tensor(rewards, dtype=torch.float32)).tolist()


def derive_seed(seed: int, step: int) -> int:
    """A seed of its own for every step of every run seed."""
    return random.Random(f"{seed}:{step}").getrandbits(63)
