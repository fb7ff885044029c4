"""Divergences between the rollout policy mu and the trained policy pi, over a reduced support.

Source: "Rethinking the Trust Region in LLM Reinforcement Learning", arXiv 2602.04879v3, called [P] below.
Shapes: N tokens, S outcomes of the reduced support that an approximation chose (`approx.py`). An outcome without mass
under a policy has log-probability -inf.

A divergence is a frozen dataclass with two thresholds and `__call__`; docs/extending.md adds one in ten lines. One that
also has `slack` is known on both sides: over a reduced support it is a lower bound of the divergence D of the whole
distributions, and  value <= D <= value + slack.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from dppo_cli.errors import ConfigError

RESOLUTION = 2.0**-24
"""Floor of a mass that is computed as 1 - p in float32. Below it the difference is only rounding. If it were rounded to
0 under only one of the two policies, their KL divergence could be infinite."""


class Divergence(Protocol):
    """D(mu, pi) per token, with the threshold delta for tokens of negative (low) and positive (high) advantage."""

    @property
    def delta_low(self) -> float: ...
    @property
    def delta_high(self) -> float: ...

    def __call__(self, log_mu_NS: Tensor, log_pi_NS: Tensor) -> Tensor: ...


@runtime_checkable
class Bounded(Protocol):
    """A divergence that is also known from above, whichever way the tokens of the last outcome, the rest, are spread.

    `slack`: how much more D can be than the value over the support, float32 [N], from the log-probs of the rest under
    mu and pi, float32 [N], and log pi of all tokens, float32 [N, V].
    """

    def slack(self, log_mu_rest_N: Tensor, log_pi_rest_N: Tensor, log_pi_NV: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class TotalVariation:
    """TV(mu, pi) = 1/2 sum_s |mu(s) - pi(s)|, in [0, 1].  [P] Eq. 13 (binary), Eq. 15 (top-K)."""

    delta_low: float
    delta_high: float

    usual_delta: ClassVar[tuple[float, float]] = (0.10, 0.20)

    def __post_init__(self) -> None:
        check_thresholds("tv", self.delta_low, self.delta_high, largest=1.0)

    def __call__(self, log_mu_NS: Tensor, log_pi_NS: Tensor) -> Tensor:
        """float32 [N] from two log-probability tensors [N, S] of any float dtype (computed in float32)."""
        # In exact arithmetic the value is at most 1. With rounding it could exceed 1, and so a threshold of 1.
        return (0.5 * (log_mu_NS.float().exp() - log_pi_NS.float().exp()).abs().sum(-1)).clamp(max=1.0)

    def slack(self, log_mu_rest_N: Tensor, log_pi_rest_N: Tensor, log_pi_NV: Tensor) -> Tensor:
        """min(m, p), [N]; m, p: masses of the rest.

        1/2 sum |mu - pi| over it is at least |m - p|/2, the triangle inequality, and at most (m + p)/2.
        """
        return torch.minimum(log_mu_rest_N, log_pi_rest_N).exp()


@dataclass(frozen=True)
class KL:
    """KL(mu || pi) = sum_s mu(s) log(mu(s) / pi(s)), in nats, in [0, inf].  [P] Eq. 14 (binary), Eq. 16 (top-K).

    An outcome with mu(s) = 0 contributes 0 for any pi(s). One with mu(s) > 0 = pi(s) makes the divergence infinite.
    """

    delta_low: float
    delta_high: float

    usual_delta: ClassVar[tuple[float, float]] = (0.05, 0.15)

    def __post_init__(self) -> None:
        check_thresholds("kl", self.delta_low, self.delta_high, largest=float("inf"))

    def __call__(self, log_mu_NS: Tensor, log_pi_NS: Tensor) -> Tensor:
        """float32 [N] from two log-probability tensors [N, S] of any float dtype (computed in float32)."""
        return kl(log_mu_NS, log_pi_NS)

    def slack(self, log_mu_rest_N: Tensor, log_pi_rest_N: Tensor, log_pi_NV: Tensor) -> Tensor:
        """m log(p / pi_min), nats [N]; m, p: masses of the rest.

        sum mu log(mu/pi) over it is at least m log(m/p), the log-sum inequality, and at most m log(m/pi_min), where
        pi_min is the smallest probability of any token. Infinite where that is 0, unless m is only rounding.
        """
        factor_N = (log_pi_rest_N - log_pi_NV.amin(-1)).clamp(min=0.0)
        return torch.where(log_mu_rest_N.exp() <= RESOLUTION, 0.0, log_mu_rest_N.exp() * factor_N)


def kl(log_mu_NS: Tensor, log_pi_NS: Tensor) -> Tensor:
    """KL(mu || pi) in nats, float32 [N], from two log-probability tensors [N, S] of any float dtype."""
    log_mu_NS, log_pi_NS = log_mu_NS.float(), log_pi_NS.float()
    mu_NS = log_mu_NS.exp()
    # If mu is NaN, it is not 0, so its term stays NaN, and `refuse_nan` finds it.
    terms_NS = torch.where(mu_NS == 0, 0.0, mu_NS * (log_mu_NS - log_pi_NS))
    # In exact arithmetic the sum is >= 0. Rounding can give -1e-9, which is not a valid divergence.
    return terms_NS.sum(-1).clamp(min=0.0)


def check_thresholds(name: str, delta_low: float, delta_high: float, largest: float) -> None:
    """Raise ConfigError unless both thresholds are in [0, largest]."""
    for key, delta in (("delta_low", delta_low), ("delta_high", delta_high)):
        if not 0 <= delta <= largest:
            raise ConfigError(f"divergence.{key}={delta} is outside [0, {largest:g}], the range of {name}")
