"""Which tokens the trust region touched, over a whole run. Shapes: N tokens."""

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from dppo_cli.telemetry.masked_by_mu import MaskedByMu
from dppo_cli.training.files import as_count, as_number, write_json
from dppo_cli.training.run_folder import MASKED_BY_MU, MASKED_TOKENS
from dppo_cli.types import EvalReport, RunInfo, StepReport, TokenStats

MOST = 20
"""Tokens in masked_tokens.json."""


@dataclass
class TokenTally:
    """Sums over the masked occurrences of one token and one sign of A."""

    seen: int = 0
    masked: int = 0
    mu_sum: float = 0.0
    pi_sum: float = 0.0


class MaskedTokens:
    """A listener that counts, over a run, which tokens the trust region masked, and how likely the sampler found them.

    Writes masked_tokens.json and masked_by_mu.json.
    """

    def __init__(self, text_of: Callable[[int], str]) -> None:
        """`text_of`: a token's text."""
        self.text_of = text_of
        self.run_dir: Path | None = None
        self.tallies: dict[tuple[int, int], TokenTally] = {}
        self.by_mu = MaskedByMu()

    def started(self, run: RunInfo) -> None:
        self.run_dir = run.run_dir

    def evaluated(self, report: EvalReport) -> None: ...

    def stepped(self, report: StepReport) -> None:
        parts = [part for update in report.updates for part in update]
        if parts:
            self.add(TokenStats.cat(parts))

    def warned(self, text: str) -> None: ...

    def finished(self, summary: Mapping[str, Any] | None) -> None:
        if summary is not None and self.run_dir is not None:
            write_json(self.run_dir / MASKED_TOKENS, self.rows(MOST))
            write_json(self.run_dir / MASKED_BY_MU, self.by_mu.rows())
            self.run_dir = None  # Once: a run calls this before it writes its summary, and again with all listeners.

    def state(self) -> dict[str, Any]:
        """The counts so far, as JSON."""
        tallies = [[*key, *astuple(tally)] for key, tally in self.tallies.items()]
        return {"tallies": tallies, "by_mu": self.by_mu.sums.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError, TypeError or KeyError for what `state` does not give."""
        self.tallies = {
            (as_count(token), int(sign)): TokenTally(as_count(seen), as_count(masked), as_number(mu), as_number(pi))
            for token, sign, seen, masked, mu, pi in state["tallies"]
        }
        if any(token >= 2**31 for token, _ in self.tallies):
            raise ValueError("a tokenizer has no such number")
        self.by_mu.load(state["by_mu"])

    def add(self, stats: TokenStats) -> None:
        self.by_mu.add(stats)
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

    def rows(self, most: int) -> list[dict[str, Any]]:
        """The `most` tokens masked most often: text, sign of A, times masked and seen, mean mu and pi where masked."""
        ranked = sorted(self.tallies.items(), key=lambda item: (-item[1].masked, item[0]))
        return [
            {
                "token": token,
                "text": self.text_of(token),
                "advantage": "+" if sign > 0 else "-",
                "masked": tally.masked,
                "seen": tally.seen,
                "mean_mu": tally.mu_sum / tally.masked,
                "mean_pi": tally.pi_sum / tally.masked,
            }
            for (token, sign), tally in ranked[:most]
            if tally.masked
        ]
