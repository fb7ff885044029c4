"""The loss of each sampled token, from support, divergence, objective and the KL term to a reference.

    S = support(mu, pi)      approx.py: which outcomes are compared
    D = divergence over S    divergence.py, against the anchor (mu, or pi_old under anchor=recompute)
    loss = objective(log pi, log mu, A, D)  +  kl_to_reference * KL(pi || ref)

Shapes: N sampled tokens, C of them at a time, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_cli.algorithm.approx import Approximation
from dppo_cli.algorithm.divergence import Divergence
from dppo_cli.algorithm.objective import Objective, Tokens, kl_to_reference
from dppo_cli.types import Batch, TokenStats

Visitor = Callable[[slice, Tensor], None]
"""Called once per chunk of tokens, without gradient, with the chunk's rows and log pi, float32 [C, V], read-only."""

LogProbs = Callable[[Visitor], tuple[Tensor, Tensor]]
"""Runs the policy over a batch: log pi of each sampled token (with gradient) and the entropy, float32 [N] each. No
[N, V] tensor exists, so code that needs the whole distribution is a visitor."""


@dataclass(frozen=True)
class Loss:
    """`kl_weight` of KL(pi || ref), in the unit of the loss per nat; 0 switches the term off."""

    approx: Approximation
    divergence: Divergence
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
        divergence_N = torch.empty_like(batch.advantage_N)

        def measure(rows: slice, log_pi_CV: Tensor) -> None:
            logp_pi_C = log_pi_CV.gather(-1, batch.token_N[rows, None]).squeeze(-1)
            support = self.approx.support(batch.anchor[rows], batch.token_N[rows], logp_pi_C, log_pi_CV)
            divergence_N[rows] = self.divergence(*support)

        logp_pi_N, entropy_N = log_probs(measure)
        tokens = Tokens(
            logp_pi_N=logp_pi_N,
            logp_mu_N=batch.mu.logp_N,
            logp_anchor_N=batch.anchor.logp_N,
            advantage_N=batch.advantage_N,
            divergence_N=divergence_N,
            sequence_N=batch.row_N,
            delta_low=self.divergence.delta_low,
            delta_high=self.divergence.delta_high,
        )
        loss_N, keep_N = self.objective(tokens)
        reference_kl_N = torch.zeros_like(divergence_N)
        if logp_ref_N is not None:
            loss_N = loss_N + self.kl_weight * kl_to_reference(logp_pi_N, logp_ref_N, batch.mu.logp_N)
            reference_kl_N = logp_pi_N.detach() - logp_ref_N
        return loss_N, _stats(batch, tokens, keep_N, entropy_N, reference_kl_N)


def _stats(batch: Batch, tokens: Tokens, keep_N: Tensor, entropy_N: Tensor, reference_kl_N: Tensor) -> TokenStats:
    logp_pi_N = tokens.logp_pi_N.detach()
    columns = (
        batch.token_N,
        tokens.logp_mu_N.exp(),
        logp_pi_N.exp(),
        logp_pi_N - tokens.logp_mu_N,
        tokens.divergence_N,
        tokens.advantage_N,
        keep_N,
        entropy_N,
        reference_kl_N,
    )
    return TokenStats(*(c.cpu() for c in columns))
