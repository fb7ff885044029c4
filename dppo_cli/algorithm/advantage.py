"""Advantages of the samples of one prompt, relative to one another.

Shapes: G samples of a group; the formulas also accept several groups of one size, [..., G]. A reward of NaN marks a
sample that was not judged: it is left out of its group's statistics, and its advantage is 0.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Advantage(Protocol):
    """Maps rewards float32 [G] to advantages float32 [G]; a group of equal rewards gives exactly 0.

    `min_samples`: the smallest G for which the advantage is not identically zero or undefined.
    """

    @property
    def min_samples(self) -> int: ...

    def __call__(self, reward_G: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class GroupMean:
    """A = R - mean(R). Dividing by the standard deviation would raise the weight of very easy and very hard prompts."""

    min_samples: ClassVar[int] = 2

    def __call__(self, reward_G: Tensor) -> Tensor:
        return _centred(reward_G)


@dataclass(frozen=True)
class GroupStd:
    """A = (R - mean(R)) / (std(R) + 1e-6), std with divisor G: GRPO, arXiv 2402.03300."""

    min_samples: ClassVar[int] = 2

    def __call__(self, reward_G: Tensor) -> Tensor:
        advantage_G = _centred(reward_G)
        judged_G = ~torch.isnan(reward_G)
        count_1 = judged_G.sum(-1, keepdim=True).clamp(min=1)
        std_1 = (advantage_G.square().sum(-1, keepdim=True) / count_1).sqrt()
        return advantage_G / (std_1 + 1e-6)


@dataclass(frozen=True)
class LeaveOneOut:
    """A_i = R_i - mean of the other samples' R = (R_i - mean(R)) G / (G - 1): RLOO, arXiv 2402.14740."""

    min_samples: ClassVar[int] = 2

    def __call__(self, reward_G: Tensor) -> Tensor:
        count_1 = (~torch.isnan(reward_G)).sum(-1, keepdim=True)
        return _centred(reward_G) * count_1 / (count_1 - 1).clamp(min=1)


def _centred(reward_G: Tensor) -> Tensor:
    judged_G = ~torch.isnan(reward_G)
    known_G = torch.where(judged_G, reward_G, 0.0)
    mean_1 = known_G.sum(-1, keepdim=True) / judged_G.sum(-1, keepdim=True).clamp(min=1)
    # Rounding in the mean of equal rewards, such as three times 0.1, must not cause a gradient.
    low_1 = torch.where(judged_G, reward_G, torch.inf).amin(-1, keepdim=True)
    high_1 = torch.where(judged_G, reward_G, -torch.inf).amax(-1, keepdim=True)
    return torch.where(judged_G & (low_1 < high_1), known_G - mean_1, 0.0)
