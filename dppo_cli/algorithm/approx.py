"""Approximations: the reduced support on which a divergence between mu and pi is computed.

Source: [P] = arXiv 2602.04879v3, section 4 and appendix B. Merging outcomes never increases a divergence (data
processing inequality), so for every divergence here  binary <= top-K <= full.

Shapes: N tokens, V vocabulary, K reported tokens, S outcomes of the reduced support, H hidden size.
All results are float32; inputs of lower precision are upcast before any exponential.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from dppo_cli.algorithm.divergence import RESOLUTION
from dppo_cli.errors import ConfigError
from dppo_cli.types import PolicyReport

WHOLE_VOCABULARY = -1
"""`num_logprobs` of an approximation that needs all of mu. Inference servers use the same value."""


class Approximation(Protocol):
    """Chooses the support. `num_logprobs`: how many of mu's largest log-probs the rollout engine reports per token.

    Unless it is the whole vocabulary, the last outcome is the rest: all tokens that are not named, together.
    """

    @property
    def num_logprobs(self) -> int: ...

    def support(
        self, mu: PolicyReport, token_N: Tensor, logp_pi_N: Tensor, log_pi_NV: Tensor
    ) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Binary:
    """{a_t, rest}: the sampled token and all other tokens together.  [P] Eq. 13, 14."""

    num_logprobs: ClassVar[int] = 0

    def support(self, mu: PolicyReport, token_N: Tensor, logp_pi_N: Tensor, log_pi_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(log_mu, log_pi), each [N, 2]."""
        return binary_support(mu.logp_N, logp_pi_N)


@dataclass(frozen=True)
class TopK:
    """{K most likely tokens of mu} + {a_t} + {other}: S = K + 2.  [P] Eq. 15, 16."""

    k: int

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ConfigError(
                f"approx.k={self.k} must be at least 1; approx=binary is the approximation without a list"
            )

    @property
    def num_logprobs(self) -> int:
        return self.k

    def support(self, mu: PolicyReport, token_N: Tensor, logp_pi_N: Tensor, log_pi_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(log_mu, log_pi), each [N, K + 2]."""
        assert mu.topk_ids_NK is not None and mu.topk_logp_NK is not None
        return topk_support(token_N, mu.logp_N, mu.topk_ids_NK, mu.topk_logp_NK, log_pi_NV)


@dataclass(frozen=True)
class Full:
    """The whole vocabulary: the exact divergence. mu is computed from its final hidden states, chunk by chunk."""

    num_logprobs: ClassVar[int] = WHOLE_VOCABULARY

    def support(self, mu: PolicyReport, token_N: Tensor, logp_pi_N: Tensor, log_pi_NV: Tensor) -> tuple[Tensor, Tensor]:
        """(log_mu, log_pi), each [N, V]."""
        return mu.full_log_probs(), log_pi_NV


def binary_support(logp_mu_N: Tensor, logp_pi_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of {a_t, rest} under both policies, from those of a_t.  [P] Eq. 13, 14.

    Args: log mu(a_t) and log pi(a_t), float [N], each <= 0 up to rounding.
    Returns: (log_mu, log_pi), each float32 [N, 2]; column 0 is a_t, column 1 log(1 - p), not below log(RESOLUTION).
    """
    return _with_complement(logp_mu_N), _with_complement(logp_pi_N)


def topk_support(
    token_N: Tensor, logp_mu_N: Tensor, topk_ids_NK: Tensor, topk_logp_mu_NK: Tensor, log_pi_NV: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of TopK(mu, K) union {a_t}, and of the other tokens together, under mu and pi.  [P] Eq. 15, 16.

    The support depends on mu only; pi is looked up by id. Columns: the K reported tokens; a_t if it is not one of them,
    else an outcome without mass (-inf under both policies); and `other`.

    Args:
        token_N: int64 [N], sampled tokens.  logp_mu_N: float [N], log mu(a_t).
        topk_ids_NK, topk_logp_mu_NK: int64 and float [N, K], distinct ids and their log mu. K may reach V.
        log_pi_NV: float [N, V], normalised log pi.
    Returns: (log_mu_NS, log_pi_NS), each float32 [N, K + 2].
    """
    reported_N = (topk_ids_NK == token_N[:, None]).any(-1)
    log_pi_NK = log_pi_NV.gather(-1, topk_ids_NK)
    logp_pi_N = log_pi_NV.gather(-1, token_N[:, None]).squeeze(-1)
    return _named_and_other(topk_logp_mu_NK, logp_mu_N, reported_N), _named_and_other(log_pi_NK, logp_pi_N, reported_N)


def _named_and_other(logp_NK: Tensor, logp_token_N: Tensor, reported_N: Tensor) -> Tensor:
    added_N = logp_token_N.float().masked_fill(reported_N, -torch.inf)
    named_NS = torch.cat([logp_NK.float(), added_N[:, None]], dim=-1)
    other_N = (1.0 - named_NS.exp().sum(-1)).clamp(min=RESOLUTION)
    return torch.cat([named_NS, other_N.log()[:, None]], dim=-1)


def _with_complement(logp_N: Tensor) -> Tensor:
    # 1 - p = -expm1(log p) stays accurate when p is near 1; 1 - exp(log p) does not.
    logp_N = logp_N.float().clamp(max=0.0)
    rest_N = (-torch.expm1(logp_N)).clamp(min=RESOLUTION)
    return torch.stack([logp_N, rest_N.log()], dim=-1)
