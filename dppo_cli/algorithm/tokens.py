"""What filters and objectives are given. Notation as in `objective.py`. Shapes: N tokens of a micro-batch."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The sampled tokens of one micro-batch, float32 [N] unless stated otherwise.

    `logp_anchor_N` are log-probs under the policy that the trust region is centred on: mu itself, or with
    `anchor=recompute` the trainer's own pi_old. `divergence_N` is the divergence between this anchor and pi. A token is
    outside of the trust region if `distance_N > limit_N`; see `region.py`.

    Example: two tokens of one response, at mu = pi, so that nothing is outside:
    `Tokens(logp_N, logp_N, logp_N, advantage_N, zero_N, zero_N, delta_N, sequence_N=torch.tensor([0, 0]))`.
    """

    logp_pi_N: Tensor  # with gradient
    logp_mu_N: Tensor
    logp_anchor_N: Tensor
    advantage_N: Tensor
    divergence_N: Tensor
    distance_N: Tensor
    limit_N: Tensor
    sequence_N: Tensor  # int64, which sequence of the micro-batch a token belongs to

    def without(self, dropped_N: Tensor) -> "Tokens":
        """The same, with A = 0, r = 1 and no gradient for the tokens of `dropped_N`, bool [N].

        Multiplying their loss by 0 would not do: where r is infinite its gradient would be NaN.
        """
        return replace(
            self,
            logp_pi_N=torch.where(dropped_N, self.logp_mu_N, self.logp_pi_N),
            advantage_N=self.advantage_N.masked_fill(dropped_N, 0.0),
        )
