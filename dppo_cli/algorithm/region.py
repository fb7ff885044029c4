"""Trust regions: how far a token is from the rollout policy, and how far it may be.

A region decides what "outside" means. It never decides about direction: the mask removes only tokens that are outside
and move further out (`trust_mask`).

Sources: [P] = arXiv 2602.04879v3; [C] = "Beyond Uniform Token-Level Trust Region in LLM Reinforcement Learning", arXiv
2606.10968v2 (CPPO); [V] = arXiv 2603.01365 (VACO). Notation as in `objective.py`. Shapes: N tokens, B responses, T
tokens of the longest, T_b tokens of one response; only tokens that the model sampled count.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from dppo_cli.algorithm.sequences import Responses
from dppo_cli.errors import ConfigError


class Limits(NamedTuple):
    """A token is outside if its distance exceeds its limit. float32 [N] each."""

    distance_N: Tensor
    limit_N: Tensor


class Region(Protocol):
    """Maps the tokens of a micro-batch to their distances and limits. Responses are never split between two calls.

    `uses_divergence`: whether it depends on D.

    `divergence_N`: D of each token. `delta_N`: its threshold, by the sign of its advantage. `log_ratio_N`: log of pi
    over the policy on which the region is centred. `sequence_N`: see `Tokens`. float32 [N] but for the last.
    """

    @property
    def uses_divergence(self) -> bool: ...

    def __call__(self, divergence_N: Tensor, delta_N: Tensor, log_ratio_N: Tensor, sequence_N: Tensor) -> Limits: ...


@dataclass(frozen=True)
class PerToken:
    """Outside: D > delta, each token for itself.  [P] Eq. 12."""

    uses_divergence: ClassVar[bool] = True

    def __call__(self, divergence_N: Tensor, delta_N: Tensor, log_ratio_N: Tensor, sequence_N: Tensor) -> Limits:
        return Limits(divergence_N, delta_N)


@dataclass(frozen=True)
class PrefixBudget:
    """Outside: w_t D_t > min(delta, delta + b W_{t-1} - S_{t-1}).  [C] Eq. 8 to 11, Algorithm 1.

        w_t = 1 - (1 - w_min) (t - 1) / max(T_b - 1, 1)
        W_t = sum_{s <= t} w_s,   S_t = sum_{s <= t} w_s D_s

    What a token changes is in the context of all that follow, so early tokens are held more tightly, and a response
    whose prefix has used up more than the budget b a token has nothing left until it falls behind. Every token counts
    in the sums, masked ones too. `adaptive`: b is the 90% quantile of the response's D, within [budget, 2 budget]
    ([C] Eq. 22); else it is `budget`. The paper has one delta; here each token has that of its sign.
    """

    w_min: float
    budget: float
    adaptive: bool

    uses_divergence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.w_min <= 1:
            raise ConfigError(f"region.w_min={self.w_min} is outside (0, 1]")
        if not self.budget > 0:
            raise ConfigError(f"region.budget={self.budget} must be positive")

    def __call__(self, divergence_N: Tensor, delta_N: Tensor, log_ratio_N: Tensor, sequence_N: Tensor) -> Limits:
        responses = Responses(sequence_N)
        t_T = torch.arange(responses.shape[1], device=divergence_N.device)
        weight_BT = 1 - (1 - self.w_min) * t_T / (responses.count_B1 - 1).clamp(min=1)
        divergence_BT = responses.padded(divergence_N)
        budget_B1 = divergence_N.new_full((responses.shape[0], 1), self.budget)
        if self.adaptive:
            budget_B1 = responses.quantile(divergence_N, 0.9).clamp(self.budget, 2 * self.budget)
        # b W - S as one sum: the difference of two large ones would have a larger error.
        left_BT = (weight_BT * (budget_B1 - divergence_BT)).cumsum(-1)
        left_BT = torch.nn.functional.pad(left_BT[:, :-1], (1, 0))  # of the tokens before each
        limit_N = delta_N + responses.flat(left_BT).clamp(max=0.0)
        return Limits(responses.flat(weight_BT * divergence_BT), limit_N)


@dataclass(frozen=True)
class SequenceMean:
    """Outside: the mean over the response of |r - 1| exceeds `upper`; all of its tokens, or none.  [V]

    Over tokens that mu sampled, |r - 1| / 2 has the total variation as its mean. So this region needs no divergence,
    and `upper` is twice a total variation. In the paper r is that of the policy at the start of the step, and does not
    move during its updates; here it does.
    """

    upper: float

    uses_divergence: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.upper > 0:
            raise ConfigError(f"region.upper={self.upper} must be positive")

    def __call__(self, divergence_N: Tensor, delta_N: Tensor, log_ratio_N: Tensor, sequence_N: Tensor) -> Limits:
        mean_N = Responses(sequence_N).mean(torch.expm1(log_ratio_N).abs())
        return Limits(mean_N, torch.full_like(mean_N, self.upper))
