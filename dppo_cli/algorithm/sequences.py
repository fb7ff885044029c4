"""Sums over each response's own tokens.

Shapes: N tokens of a micro-batch, those of a response in its order; B responses; T tokens of the longest.
"""

import torch
from torch import Tensor


class Responses:
    """Which of N tokens belong together. `count_B1`: float32, the number of tokens of each response, 0 if it has none.

    Sums are over padded rows, not by adding at an index, whose order on a GPU is another in each run.
    """

    def __init__(self, sequence_N: Tensor) -> None:
        """`sequence_N`: int64, the number of each token's response."""
        count_B = sequence_N.bincount()
        first_B = count_B.cumsum(0) - count_B
        together = sequence_N.argsort(stable=True)
        self.row_N, self.column_N = sequence_N, torch.empty_like(sequence_N)
        self.column_N[together] = torch.arange(len(together), device=together.device) - first_B[sequence_N[together]]
        self.count_B1 = count_B[:, None].float()
        self.shape = (len(count_B), int(count_B.max()) if len(count_B) else 0)

    def padded(self, value_N: Tensor, padding: float = 0.0) -> Tensor:
        """A response a row, [B, T]."""
        value_BT = value_N.new_full(self.shape, padding)
        value_BT[self.row_N, self.column_N] = value_N
        return value_BT

    def flat(self, value_BT: Tensor) -> Tensor:
        """The inverse of `padded`; [B, 1] gives each token its response's value."""
        value_BT = value_BT.expand(self.shape)
        return value_BT[self.row_N, self.column_N]

    def sum(self, value_N: Tensor) -> Tensor:
        """Each token's value replaced by the sum over its response, [N]."""
        return self.flat(self.padded(value_N).sum(-1, keepdim=True))

    def mean(self, value_N: Tensor) -> Tensor:
        """Each token's value replaced by the mean over its response, [N]."""
        return self.flat(self.padded(value_N).sum(-1, keepdim=True) / self.count_B1)

    def all(self, value_N: Tensor) -> Tensor:
        """bool [N]: whether `value_N`, bool [N], holds for every token of the response."""
        return self.flat(self.padded(value_N, padding=True).all(-1, keepdim=True))

    def quantile(self, value_N: Tensor, q: float) -> Tensor:
        """Of each response's values, [B, 1], interpolated between the two nearest ranks; any value if it has none."""
        finite_N = value_N.clamp(max=torch.finfo(value_N.dtype).max)  # inf - inf would be NaN
        sorted_BT = self.padded(finite_N, padding=torch.inf).sort(-1).values
        rank_B1 = q * (self.count_B1 - 1).clamp(min=0)
        low_B1, high_B1 = (sorted_BT.gather(-1, rank.long()) for rank in (rank_B1.floor(), rank_B1.ceil()))
        return low_B1 + (high_B1 - low_B1) * (rank_B1 - rank_B1.floor())
