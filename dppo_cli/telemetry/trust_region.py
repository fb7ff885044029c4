"""What the trust region saw and touched: per step in numbers, per run as a table of the tokens masked most.

Mask fractions are over tokens with A != 0, split by the sign of A. Shapes: N tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dppo_cli.algorithm.objective import Tokens
from dppo_cli.types import Batch

QUANTILES = (0.5, 0.9, 0.99, 1.0)


@dataclass(frozen=True)
class TokenStats:
    """Sampled tokens at an update, on the CPU, [N] each; float32 unless said otherwise."""

    token_N: Tensor  # int64
    mu_N: Tensor
    pi_N: Tensor
    log_ratio_N: Tensor  # log pi/mu
    divergence_N: Tensor
    advantage_N: Tensor
    keep_N: Tensor  # bool
    entropy_N: Tensor  # nats
    reference_kl_N: Tensor  # log pi/ref, nats; 0 without a reference term

    @staticmethod
    def collect(
        batch: Batch, tokens: Tokens, keep_N: Tensor, entropy_N: Tensor, reference_kl_N: Tensor
    ) -> "TokenStats":
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

    @staticmethod
    def cat(parts: Sequence["TokenStats"]) -> "TokenStats":
        return TokenStats(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(TokenStats)))


def step_metrics(updates: Sequence[Sequence[TokenStats]]) -> dict[str, Any]:
    """The trust region's figures of one step, from the token statistics of each of its updates.

    `mismatch_*` is |pi - mu| at the first update, where pi has not moved yet: what the rollout engine and the trainer
    disagree on. `shift_*` is |pi - mu| over all updates. Empty updates (every sample skipped) count for nothing; a step
    without any token gives None throughout.
    """
    parts = [part for update in updates for part in update]
    names = [
        "mismatch_mean",
        "shift_mean",
        "shift_max",
        "masked_positive",
        "masked_negative",
        "entropy",
        "reference_kl",
    ]
    names += [f"{kind}_p{round(100 * q)}" for kind in ("divergence", "ratio") for q in QUANTILES] + ["ratio_p1"]
    if not parts:
        return dict.fromkeys(names)
    seen = TokenStats.cat(parts)
    shift_N = (seen.pi_N - seen.mu_N).abs()
    ratio_N = seen.log_ratio_N.exp()
    first = next(update for update in updates if update)
    start = TokenStats.cat(first) if first is updates[0] else None
    found: dict[str, Any] = {
        "mismatch_mean": _mean((start.pi_N - start.mu_N).abs()) if start else None,
        "shift_mean": _mean(shift_N),
        "shift_max": float(shift_N.max()),
        "masked_positive": _mean((~seen.keep_N[seen.advantage_N > 0]).float()),
        "masked_negative": _mean((~seen.keep_N[seen.advantage_N < 0]).float()),
        "entropy": _mean(seen.entropy_N),
        "reference_kl": _mean(seen.reference_kl_N),
    }
    for q in QUANTILES:
        found[f"divergence_p{round(100 * q)}"] = _quantile(seen.divergence_N, q)
        found[f"ratio_p{round(100 * q)}"] = _quantile(ratio_N, q)
    found["ratio_p1"] = _quantile(ratio_N, 0.01)
    return found


@dataclass
class TokenTally:
    """Sums over the masked occurrences of one token and one sign of A."""

    seen: int = 0
    masked: int = 0
    mu_sum: float = 0.0
    pi_sum: float = 0.0


class MaskedTokens:
    """Counts, over a run, which tokens the trust region masked."""

    def __init__(self) -> None:
        self.tallies: dict[tuple[int, int], TokenTally] = {}

    def add(self, stats: TokenStats) -> None:
        for sign in (1, -1):
            side_N = stats.advantage_N.sign() == sign
            ids, index_N = stats.token_N[side_N].unique(return_inverse=True)
            masked_N = ~stats.keep_N[side_N]
            sums = [torch.zeros(len(ids), dtype=torch.float64) for _ in range(4)]
            values = (torch.ones_like(masked_N), masked_N, stats.mu_N[side_N] * masked_N, stats.pi_N[side_N] * masked_N)
            for total, value in zip(sums, values, strict=True):
                total.index_add_(0, index_N, value.double())
            for token, seen, masked, mu, pi in zip(ids.tolist(), *(s.tolist() for s in sums), strict=True):
                tally = self.tallies.setdefault((token, sign), TokenTally())
                tally.seen += int(seen)
                tally.masked += int(masked)
                tally.mu_sum += mu
                tally.pi_sum += pi

    def rows(self, most: int, text_of: Any) -> list[dict[str, Any]]:
        """The `most` tokens masked most often: text, sign of A, times masked and seen, mean mu and pi where masked."""
        ranked = sorted(self.tallies.items(), key=lambda item: (-item[1].masked, item[0]))
        return [
            {
                "token": token,
                "text": text_of(token),
                "advantage": "+" if sign > 0 else "-",
                "masked": tally.masked,
                "seen": tally.seen,
                "mean_mu": tally.mu_sum / tally.masked,
                "mean_pi": tally.pi_sum / tally.masked,
            }
            for (token, sign), tally in ranked[:most]
            if tally.masked
        ]


def _mean(value_N: Tensor) -> float | None:
    return float(value_N.mean()) if value_N.numel() else None


def _quantile(value_N: Tensor, q: float) -> float:
    # Nearest rank by kthvalue, because torch.quantile refuses more than 16 million values.
    return float(value_N.kthvalue(max(1, math.ceil(q * value_N.numel()))).values)
