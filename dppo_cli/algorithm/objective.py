"""Policy objectives: the loss of each sampled token, and which tokens the trust region keeps.

Sources: [P] = arXiv 2602.04879v3 (DPPO and the baselines of its experiments), [D] = arXiv 2606.09821 (DRPO).

Notation: mu = rollout policy, pi = trained policy, r = pi/mu of the sampled token, A = advantage, D = divergence,
delta = threshold, M = keep-mask, sg = stop-gradient. Shapes: N tokens. Losses are minimised, so their signs are
opposite to those in the papers. Ratios that weigh a gradient are detached: the gradient of `-sg(w) log pi` is Eq. 23 of
[P].
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from dppo_cli.algorithm.sequences import Responses
from dppo_cli.algorithm.tokens import Tokens
from dppo_cli.errors import ConfigError, NumericalError


class TokenLoss(NamedTuple):
    """`loss_N`: float32 [N] with gradient. `keep_N`: bool [N], False where the mask removed the token's gradient."""

    loss_N: Tensor
    keep_N: Tensor


class Objective(Protocol):
    """Maps tokens to their losses. Sequences are never split between two calls.

    `needs_all_tokens`: whether tokens with A = 0 have a gradient, too. If not, their forward pass is skipped.
    `masks`: whether it can remove a token's gradient. An objective may also say `uses_region = True`: its mask is by
    the distances and limits of the region. If it does not, only region=token goes with it.
    """

    @property
    def needs_all_tokens(self) -> bool: ...
    @property
    def masks(self) -> bool: ...

    def __call__(self, tokens: Tokens) -> TokenLoss: ...


def trust_mask(
    advantage_N: Tensor,
    logp_mu_N: Tensor,
    logp_pi_N: Tensor,
    divergence_N: Tensor,
    delta_low: float | Tensor,
    delta_high: float | Tensor,
) -> Tensor:
    """M = False iff (A > 0 and r > 1 and D > delta_high) or (A < 0 and r < 1 and D > delta_low).  [P] Eq. 12.

    All inequalities are strict, so tokens with D = delta, r = 1 or A = 0 are kept. A step back towards r = 1 is always
    kept.

    Args: float [N] each; a delta for all tokens, or [N]. Returns: bool [N]. Raises NumericalError if a divergence is
    NaN: a comparison with NaN is false, so the token would silently count as inside the trust region.
    """
    refuse_nan(divergence_N)
    leaves_up_N = (advantage_N > 0) & (logp_pi_N > logp_mu_N) & (divergence_N > delta_high)
    leaves_down_N = (advantage_N < 0) & (logp_pi_N < logp_mu_N) & (divergence_N > delta_low)
    return ~(leaves_up_N | leaves_down_N)


def refuse_nan(divergence_N: Tensor) -> None:
    """Raise NumericalError if a divergence is NaN."""
    if torch.isnan(divergence_N).any():
        broken = torch.isnan(divergence_N).nonzero().squeeze(-1).tolist()
        text = f"the divergence of {len(broken)} of {divergence_N.numel()} tokens is NaN: log-probs are broken"
        raise NumericalError(text, broken)


@dataclass(frozen=True)
class DPPO:
    """loss = -sg(M min(r, C) A) log pi,  M from the region: D > delta, for one.  [P] Eq. 12, 23."""

    ratio_cap: float | None

    needs_all_tokens: ClassVar[bool] = False
    masks: ClassVar[bool] = True
    uses_region: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_cap(self.ratio_cap)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        keep_N = trust_mask(
            tokens.advantage_N,
            tokens.logp_anchor_N,
            tokens.logp_pi_N.detach(),
            tokens.distance_N,
            tokens.limit_N,
            tokens.limit_N,
        )
        return _weighted(tokens, keep_N, self.ratio_cap)


@dataclass(frozen=True)
class RatioClip:
    """PPO: M from D := |r - 1| with eps as thresholds.  [P] Eq. 10 (the gradient of min(r A, clip(r) A)).

    `ppo` (0.2, 0.2) and `ppo_clip_higher` (0.2, 0.28) use mu as the anchor. `minirl` is `ppo` with `anchor=recompute`:
    pi/pi_old in the mask and pi/mu in the weight.
    """

    eps_low: float
    eps_high: float
    ratio_cap: float | None

    needs_all_tokens: ClassVar[bool] = False
    masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive(eps_low=self.eps_low, eps_high=self.eps_high)
        _check_cap(self.ratio_cap)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp_pi_N = tokens.logp_pi_N.detach()
        distance_N = torch.expm1(logp_pi_N - tokens.logp_anchor_N).abs()
        keep_N = trust_mask(
            tokens.advantage_N, tokens.logp_anchor_N, logp_pi_N, distance_N, self.eps_low, self.eps_high
        )
        return _weighted(tokens, keep_N, self.ratio_cap)


@dataclass(frozen=True)
class PolicyGradient:
    """loss = -sg(min(r, C) A) log pi, no mask: `pg_is` has no cap, `cispo` (truncated importance sampling) has one."""

    ratio_cap: float | None

    needs_all_tokens: ClassVar[bool] = False
    masks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_cap(self.ratio_cap)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        return _weighted(tokens, torch.ones_like(tokens.advantage_N, dtype=torch.bool), self.ratio_cap)


@dataclass(frozen=True)
class MinimalMask:
    """Drop only tokens with A < 0 and mu - pi >= threshold.  [P] section 5.3."""

    threshold: float
    ratio_cap: float | None

    needs_all_tokens: ClassVar[bool] = False
    masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive(threshold=self.threshold)
        _check_cap(self.ratio_cap)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        fall_N = tokens.logp_anchor_N.exp() - tokens.logp_pi_N.detach().exp()
        keep_N = ~((tokens.advantage_N < 0) & (fall_N >= self.threshold))
        return _weighted(tokens, keep_N, self.ratio_cap)


@dataclass(frozen=True)
class GSPO:
    """Sequence ratio s = exp(mean_t log r), clipped like PPO's; every token of a sequence shares s and M.

    loss = -sg(M s A) log pi per token. The publication (arXiv 2507.18071) also divides by the response's length. Here
    only the aggregation divides, and by the same number for all responses.
    """

    eps_low: float
    eps_high: float

    needs_all_tokens: ClassVar[bool] = False
    masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive(eps_low=self.eps_low, eps_high=self.eps_high)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        logp_pi_N = tokens.logp_pi_N.detach()
        log_s_N = Responses(tokens.sequence_N).mean(logp_pi_N - tokens.logp_anchor_N)
        zero_N = torch.zeros_like(log_s_N)
        distance_N = torch.expm1(log_s_N).abs()
        keep_N = trust_mask(tokens.advantage_N, zero_N, log_s_N, distance_N, self.eps_low, self.eps_high)
        return _weigh(tokens, keep_N, log_s_N.exp())


@dataclass(frozen=True)
class IPO:
    """Drop tokens with |pi - mu| > eps for either sign of A; add penalty (log r)^2.

    loss = -sg(M r A) log pi + penalty (log pi - log mu)^2
    """

    eps: float
    penalty: float
    ratio_cap: float | None

    masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_positive(eps=self.eps)
        _check_cap(self.ratio_cap)
        if self.penalty < 0:
            raise ConfigError(f"objective.penalty={self.penalty} must not be negative")

    @property
    def needs_all_tokens(self) -> bool:
        return self.penalty > 0

    def __call__(self, tokens: Tokens) -> TokenLoss:
        shift_N = tokens.logp_pi_N.detach().exp() - tokens.logp_anchor_N.exp()
        loss_N, keep_N = _weighted(tokens, shift_N.abs() <= self.eps, self.ratio_cap)
        return TokenLoss(loss_N + self.penalty * (tokens.logp_pi_N - tokens.logp_mu_N) ** 2, keep_N)


@dataclass(frozen=True)
class DRPO:
    """loss = -A r + |A| mu (r - 1)^2 / (2 delta), with r differentiable: a penalty instead of a mask.  [D]

    Its gradient weighs r A grad log pi by 1 - sign(A (r - 1)) |pi - mu| / delta. At the authors' delta = 12.5 this
    factor never changes sign, because |pi - mu| <= 1. Smaller values may be better; try them in a sweep.
    """

    delta: float

    needs_all_tokens: ClassVar[bool] = False
    masks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive(delta=self.delta)

    def __call__(self, tokens: Tokens) -> TokenLoss:
        r_N = (tokens.logp_pi_N - tokens.logp_mu_N).exp()
        penalty_N = tokens.advantage_N.abs() * tokens.logp_mu_N.exp() * (r_N - 1) ** 2 / (2 * self.delta)
        keep_N = torch.ones_like(tokens.advantage_N, dtype=torch.bool)
        return TokenLoss(-tokens.advantage_N * r_N + penalty_N, keep_N)


def kl_to_reference(logp_pi_N: Tensor, logp_ref_N: Tensor, logp_mu_N: Tensor) -> Tensor:
    """loss_N = sg(r) 1/2 (log pi - log ref)^2, whose expected gradient is that of KL(pi || ref) at each position.

    Derivation: E_mu[r (log pi - log ref) grad log pi] = E_pi[(log pi - log ref) grad log pi] = grad KL(pi || ref),
    because the remaining term E_pi[grad log pi] is zero. Args: float32 [N]; only `logp_pi_N` receives a gradient.
    """
    r_N = (logp_pi_N.detach() - logp_mu_N).exp()
    return r_N * 0.5 * (logp_pi_N - logp_ref_N) ** 2


def _weighted(tokens: Tokens, keep_N: Tensor, ratio_cap: float | None) -> TokenLoss:
    """loss = -sg(M min(r, C) A) log pi.  [P] Eq. 23; the weight is pi/mu for every anchor."""
    r_N = (tokens.logp_pi_N.detach() - tokens.logp_mu_N).exp()
    return _weigh(tokens, keep_N, r_N if ratio_cap is None else r_N.clamp(max=ratio_cap))


def _weigh(tokens: Tokens, keep_N: Tensor, weight_N: Tensor) -> TokenLoss:
    # torch.where instead of a product: a masked token's ratio or log-prob may be infinite, and 0 * inf would be NaN.
    weight_N = torch.where(keep_N & (tokens.advantage_N != 0), weight_N * tokens.advantage_N, 0.0)
    return TokenLoss(torch.where(weight_N == 0, 0.0, -weight_N * tokens.logp_pi_N), keep_N)


def _check_positive(**values: float) -> None:
    for key, value in values.items():
        if not value > 0:
            raise ConfigError(f"objective.{key}={value} must be positive")


def _check_cap(ratio_cap: float | None) -> None:
    if ratio_cap is not None and not ratio_cap >= 1:
        raise ConfigError(f"objective.ratio_cap={ratio_cap} must be at least 1; null means no cap")
