"""The loss of each sampled token, from support, divergence, region, filter, objective and the KL term to a reference.

    S = support(mu, pi)      approx.py: which outcomes are compared
    D = divergence over S    divergence.py, against the anchor (mu, or pi_old under anchor=recompute)
    x, limit = region(D)     region.py: a token is outside if x > limit
    K = filter(...)          filters.py: which tokens are kept at all
    loss = objective(log pi, log mu, A, x, limit)  +  kl_to_reference * KL(pi || ref)  where K, else 0

Shapes: N sampled tokens, C of them at a time, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY, Approximation
from dppo_cli.algorithm.divergence import Bounded, Divergence
from dppo_cli.algorithm.filters import Filter
from dppo_cli.algorithm.objective import Objective, kl_to_reference, refuse_nan
from dppo_cli.algorithm.region import Region
from dppo_cli.algorithm.tokens import Tokens
from dppo_cli.types import Batch, TokenStats

Visitor = Callable[[slice, Tensor], None]
"""Called once per chunk of tokens, without gradient, with the chunk's rows and log pi, float32 [C, V], read-only."""

LogProbs = Callable[[Visitor], tuple[Tensor, Tensor]]
"""Runs the policy over a batch: log pi of each sampled token (with gradient) and the entropy, float32 [N] each. No
[N, V] tensor exists, so code that needs the whole distribution is a visitor."""


@dataclass(frozen=True)
class Loss:
    """`verdict`: which bound of D is compared with the threshold, `lower` (the value over S) or `upper`.

    `kl_weight` of KL(pi || ref), in the unit of the loss per nat; 0 switches the term off.
    """

    approx: Approximation
    divergence: Divergence
    verdict: str
    region: Region
    filter: Filter
    objective: Objective
    kl_weight: float

    @property
    def needs_all_tokens(self) -> bool:
        """Whether tokens with A = 0 have a gradient."""
        return self.objective.needs_all_tokens or self.kl_weight > 0

    def __call__(self, batch: Batch, log_probs: LogProbs, logp_ref_N: Tensor | None) -> tuple[Tensor, TokenStats]:
        """The loss of each token, float32 [N] with gradient, and its statistics.

        `logp_ref_N`: log-probs under the base without adapter, if `kl_weight` > 0. Raises NumericalError if a
        divergence is NaN.
        """
        lower_N, slack_N = torch.empty_like(batch.advantage_N), torch.zeros_like(batch.advantage_N)
        exact = self.approx.num_logprobs == WHOLE_VOCABULARY

        def measure(rows: slice, log_pi_CV: Tensor) -> None:
            logp_pi_C = log_pi_CV.gather(-1, batch.token_N[rows, None]).squeeze(-1)
            log_mu_CS, log_pi_CS = self.approx.support(batch.anchor[rows], batch.token_N[rows], logp_pi_C, log_pi_CV)
            lower_N[rows] = self.divergence(log_mu_CS, log_pi_CS)
            if isinstance(self.divergence, Bounded) and not exact:
                slack_N[rows] = self.divergence.slack(log_mu_CS[:, -1], log_pi_CS[:, -1], log_pi_CV)

        logp_pi_N, entropy_N = log_probs(measure)
        refuse_nan(lower_N)
        bounds = (lower_N, lower_N + slack_N)
        divergence_N, other_N = bounds if self.verdict == "lower" else reversed(bounds)
        tokens = self._tokens(batch, logp_pi_N, divergence_N)
        filtered_N = ~self.filter(tokens)
        kept = tokens.without(filtered_N)
        loss_N, keep_N = self.objective(kept)
        reference_kl_N = torch.zeros_like(divergence_N)
        if logp_ref_N is not None:
            loss_N = loss_N + self.kl_weight * kl_to_reference(kept.logp_pi_N, logp_ref_N, batch.mu.logp_N)
            reference_kl_N = logp_pi_N.detach() - logp_ref_N
        undecided_N = None
        if self.compares_divergence and (exact or isinstance(self.divergence, Bounded)):
            undecided_N = (keep_N & ~filtered_N) != self._has_gradient(self._tokens(batch, logp_pi_N.detach(), other_N))
        stats = _stats(batch, tokens, keep_N, entropy_N, reference_kl_N, filtered_N, undecided_N)
        return torch.where(filtered_N, 0.0, loss_N), stats

    @property
    def compares_divergence(self) -> bool:
        """Whether the trust region is one of the divergence."""
        return uses_region(self.objective) and self.region.uses_divergence

    def _has_gradient(self, tokens: Tokens) -> Tensor:
        """Which tokens filter and mask keep, bool [N]."""
        keep_N = self.filter(tokens)
        return keep_N & self.objective(tokens.without(~keep_N)).keep_N

    def _tokens(self, batch: Batch, logp_pi_N: Tensor, divergence_N: Tensor) -> Tokens:
        delta_N = torch.where(batch.advantage_N > 0, self.divergence.delta_high, self.divergence.delta_low)
        log_ratio_N = logp_pi_N.detach() - batch.anchor.logp_N
        distance_N, limit_N = self.region(divergence_N, delta_N, log_ratio_N, batch.row_N)
        return Tokens(
            logp_pi_N=logp_pi_N,
            logp_mu_N=batch.mu.logp_N,
            logp_anchor_N=batch.anchor.logp_N,
            advantage_N=batch.advantage_N,
            divergence_N=divergence_N,
            distance_N=distance_N,
            limit_N=limit_N,
            sequence_N=batch.row_N,
        )


def uses_region(objective: Objective) -> bool:
    """Whether its mask is by the distances and limits of the region."""
    return getattr(objective, "uses_region", False)


def _stats(
    batch: Batch,
    tokens: Tokens,
    keep_N: Tensor,
    entropy_N: Tensor,
    reference_kl_N: Tensor,
    filtered_N: Tensor,
    undecided_N: Tensor | None,
) -> TokenStats:
    logp_pi_N = tokens.logp_pi_N.detach()
    return TokenStats(
        token_N=batch.token_N.cpu(),
        mu_N=tokens.logp_mu_N.exp().cpu(),
        pi_N=logp_pi_N.exp().cpu(),
        log_ratio_N=(logp_pi_N - tokens.logp_mu_N).cpu(),
        divergence_N=tokens.divergence_N.cpu(),
        advantage_N=tokens.advantage_N.cpu(),
        keep_N=keep_N.cpu(),
        entropy_N=entropy_N.cpu(),
        reference_kl_N=reference_kl_N.cpu(),
        filtered_N=filtered_N.cpu(),
        undecided_N=None if undecided_N is None else undecided_N.cpu(),
    )
