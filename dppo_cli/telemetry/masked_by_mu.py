"""How often the trust region masks tokens, by how likely the sampler found them, over a whole run. Shapes: N tokens.

A ratio clip masks rare tokens for changes of probability that are far too small to matter, and lets likely ones drift;
a divergence does neither (arXiv 2602.04879, section 4). This table is where it can be seen.
"""

from typing import Any

import torch

from dppo_cli.types import TokenStats

DECADES = 8
"""[0.1, 1], [0.01, 0.1), ... and last all below 1e-7."""


class MaskedByMu:
    """Counts tokens and masked tokens by the decade of mu and the sign of A."""

    def __init__(self) -> None:
        # [sign, decade, (seen, masked, sum of |pi - mu|, the same of masked)]
        self.sums = torch.zeros(2, DECADES, 4, dtype=torch.float64)

    def add(self, stats: TokenStats) -> None:
        decade_N = (-stats.mu_N.log10()).floor().clamp(0, DECADES - 1).long()
        shift_N = (stats.pi_N - stats.mu_N).abs().double()
        masked_N = (~stats.keep_N).double()
        values_N4 = torch.stack([torch.ones_like(shift_N), masked_N, shift_N, shift_N * masked_N], dim=-1)
        for row, sign in enumerate((1, -1)):
            side_N = stats.advantage_N.sign() == sign
            self.sums[row].index_add_(0, decade_N[side_N], values_N4[side_N])

    def load(self, sums: Any) -> None:
        """`self.sums`, as nested lists. Raises ValueError or TypeError for anything else."""
        found = torch.tensor(sums, dtype=torch.float64)
        if found.shape != self.sums.shape or not found.isfinite().all():
            raise ValueError("these are no sums by the decade of mu")
        self.sums = found

    def rows(self) -> list[dict[str, Any]]:
        """A row for each sign and decade in which there is a token.

        `mu_from`: the decade's lower end. `seen`, `masked`: tokens. `mean_shift`, `mean_shift_masked`: mean |pi - mu|
        of both, None of none.
        """
        found = []
        for row, advantage in enumerate("+-"):
            for decade, (seen, masked, shift, of_masked) in enumerate(self.sums[row].tolist()):
                if seen:
                    found.append(
                        {
                            "advantage": advantage,
                            "mu_from": 10.0 ** -(decade + 1) if decade < DECADES - 1 else 0.0,
                            "seen": int(seen),
                            "masked": int(masked),
                            "mean_shift": shift / seen,
                            "mean_shift_masked": of_masked / masked if masked else None,
                        }
                    )
        return found
