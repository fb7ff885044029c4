"""Off-policy filters: tokens and whole responses that are too far from what sampled them to learn from.

A trust region looks at the direction of the update and drops what leads out. A filter does not: it drops what is far
from mu, whatever the update would do to it. What it drops stays in the divisor of the loss (`aggregation.py`).

Publications compute these ratios once a step, from the trainer's log-probs at its start, so they measure how much
sampler and trainer disagree. Here r is pi/mu of the policy as it is, and moves during the step's updates: a filter also
sees what the updates have changed.

Notation and shapes as in `objective.py`; a filter keeps a token where it is True.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dppo_cli.algorithm.approx import binary_support
from dppo_cli.algorithm.divergence import kl
from dppo_cli.algorithm.sequences import Responses
from dppo_cli.algorithm.tokens import Tokens
from dppo_cli.config.checks import check_choice
from dppo_cli.errors import ConfigError, NumericalError

STATISTICS = ("ratio", "k2", "k3", "two_way_kl", "divergence")
SCOPES = ("token", "sequence_mean", "sequence_sum", "sequence_every")


class Filter(Protocol):
    """Which tokens are kept, bool [N]. Responses are never split between two calls.

    `splits_responses`: whether it can drop a part of a response.
    """

    @property
    def splits_responses(self) -> bool: ...

    def __call__(self, tokens: Tokens) -> Tensor: ...


@dataclass(frozen=True)
class KeepAll:
    """No filter."""

    splits_responses: ClassVar[bool] = False

    def __call__(self, tokens: Tokens) -> Tensor:
        return torch.ones_like(tokens.advantage_N, dtype=torch.bool)


@dataclass(frozen=True)
class AllOf:
    """Keeps what every member keeps."""

    members: Mapping[str, Filter]

    def __post_init__(self) -> None:
        if not self.members:
            raise ConfigError("filter=all_of has no members: add filter.members.NAME=CHOICE, or use filter=none")

    @property
    def splits_responses(self) -> bool:
        return any(member.splits_responses for member in self.members.values())

    def __call__(self, tokens: Tokens) -> Tensor:
        keep_N = KeepAll()(tokens)
        for member in self.members.values():
            keep_N &= member(tokens)
        return keep_N


@dataclass(frozen=True)
class Band:
    """Keeps where  low <= statistic <= high;  None: no such bound. `negative_only`: tokens with A >= 0 are kept anyway.

    | statistic | of a token | unit |
    | --- | --- | --- |
    | `ratio` | r; over a response the geometric mean, or the product | |
    | `k2` | 1/2 (log r)^2: an estimate of KL(mu, pi) from samples of mu | nats |
    | `k3` | r - 1 - log r: the same, unbiased | nats |
    | `two_way_kl` | the larger of KL(mu, pi) and KL(pi, mu) over {a_t, rest} | nats |
    | `divergence` | D of the run, by its divergence and approximation | of D |

    `scope`: each `token` for itself, or whole responses by the mean (`sequence_mean`) or sum (`sequence_sum`) of the
    statistic over their tokens, or where all of their tokens are in the band (`sequence_every`).
    """

    statistic: str
    scope: str
    low: float | None
    high: float | None
    negative_only: bool

    def __post_init__(self) -> None:
        check_choice("filter.statistic", self.statistic, STATISTICS)
        check_choice("filter.scope", self.scope, SCOPES)
        if self.low is None and self.high is None:
            raise ConfigError("filter.low and filter.high are both null, so nothing is filtered; use filter=none")
        for key, bound in (("low", self.low), ("high", self.high)):
            if bound is not None and not (bound > 0 if self.statistic == "ratio" else bound >= 0):
                least = "positive" if self.statistic == "ratio" else "at least 0"
                raise ConfigError(f"filter.{key}={bound:g} must be {least}: {self.statistic} is never below 0")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ConfigError(f"filter.low={self.low:g} is above filter.high={self.high:g}: nothing would be kept")

    @property
    def splits_responses(self) -> bool:
        return self.scope == "token"

    def __call__(self, tokens: Tokens) -> Tensor:
        """bool [N]. Raises NumericalError if a statistic is NaN, or a sampled token has mu = 0."""
        value_N = self._of_tokens(tokens)
        responses = None if self.scope == "token" else Responses(tokens.sequence_N)
        if responses and self.scope != "sequence_every":
            value_N = responses.mean(value_N) if self.scope == "sequence_mean" else responses.sum(value_N)
        inside_N = self._inside(value_N)
        if responses and self.scope == "sequence_every":
            inside_N = responses.all(inside_N)
        return inside_N | (tokens.advantage_N >= 0) if self.negative_only else inside_N

    def _of_tokens(self, tokens: Tokens) -> Tensor:
        """The statistic of each token, float32 [N]; log r for the ratio, whose product would overflow."""
        logp_pi_N = tokens.logp_pi_N.detach()
        log_ratio_N = logp_pi_N - tokens.logp_mu_N
        # A comparison with NaN is false: the token would be dropped, and its broken log-probs never seen.
        broken = (torch.isnan(log_ratio_N) | (log_ratio_N == torch.inf)).nonzero().squeeze(-1).tolist()
        if broken:
            text = (
                f"log pi/mu of {len(broken)} of {log_ratio_N.numel()} tokens is NaN or infinite: log-probs are broken"
            )
            raise NumericalError(text, broken)
        if self.statistic == "ratio":
            return log_ratio_N
        if self.statistic == "k2":
            return 0.5 * log_ratio_N.square()
        if self.statistic == "k3":
            return torch.expm1(log_ratio_N) - log_ratio_N
        if self.statistic == "divergence":
            return tokens.divergence_N
        mu_N2, pi_N2 = binary_support(tokens.logp_mu_N, logp_pi_N)
        return torch.maximum(kl(mu_N2, pi_N2), kl(pi_N2, mu_N2))

    def _inside(self, value_N: Tensor) -> Tensor:
        low, high = self.low, self.high
        if self.statistic == "ratio":
            low, high = (None if bound is None else math.log(bound) for bound in (low, high))
        inside_N = torch.ones_like(value_N, dtype=torch.bool)
        if low is not None:
            inside_N &= value_N >= low
        if high is not None:
            inside_N &= value_N <= high
        return inside_N
