"""Advantages of the samples of one prompt, relative to one another.

Shapes: P prompts, G samples per prompt. A reward of NaN marks a sample that the reward function declined to judge: it
is left out of its group's statistics and its advantage is 0.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Advantage(Protocol):
    """Maps rewards float32 [P, G] to advantages float32 [P, G]; a group of equal rewards gives exactly 0.

    `min_samples`: the smallest G for which the advantage is not identically zero or undefined.
    """

    @property
    def min_samples(self) -> int: ...

    def __call__(self, reward_PG: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class GroupMean:
    """A = R - mean(R): no division by the spread, so easy and hard prompts weigh what their rewards say."""

    min_samples: ClassVar[int] = 2

    def __call__(self, reward_PG: Tensor) -> Tensor:
        return _centred(reward_PG)


@dataclass(frozen=True)
class GroupStd:
    """A = (R - mean(R)) / (std(R) + 1e-6), std with divisor G: GRPO, arXiv 2402.03300."""

    min_samples: ClassVar[int] = 2

    def __call__(self, reward_PG: Tensor) -> Tensor:
        advantage_PG = _centred(reward_PG)
        judged_PG = ~torch.isnan(reward_PG)
        count_P1 = judged_PG.sum(-1, keepdim=True).clamp(min=1)
        std_P1 = (advantage_PG.square().sum(-1, keepdim=True) / count_P1).sqrt()
        return advantage_PG / (std_P1 + 1e-6)


@dataclass(frozen=True)
class LeaveOneOut:
    """A_i = R_i - mean of the other samples' R = (R_i - mean(R)) G / (G - 1): RLOO, arXiv 2402.14740."""

    min_samples: ClassVar[int] = 2

    def __call__(self, reward_PG: Tensor) -> Tensor:
        count_P1 = (~torch.isnan(reward_PG)).sum(-1, keepdim=True)
        return _centred(reward_PG) * count_P1 / (count_P1 - 1).clamp(min=1)


def _centred(reward_PG: Tensor) -> Tensor:
    judged_PG = ~torch.isnan(reward_PG)
    known_PG = torch.where(judged_PG, reward_PG, 0.0)
    mean_P1 = known_PG.sum(-1, keepdim=True) / judged_PG.sum(-1, keepdim=True).clamp(min=1)
    # Rounding in the mean of equal rewards (three times 0.1, say) must not turn into a gradient.
    low_P1 = torch.where(judged_PG, reward_PG, torch.inf).amin(-1, keepdim=True)
    high_P1 = torch.where(judged_PG, reward_PG, -torch.inf).amax(-1, keepdim=True)
    return torch.where(judged_PG & (low_P1 < high_P1), known_PG - mean_P1, 0.0)
