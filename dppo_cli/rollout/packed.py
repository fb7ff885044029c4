"""Linear layers for token-by-token sampling on a CPU."""

import torch
from torch import Tensor, nn

TYPICAL_ROWS = 64
"""Sequences in a wave that the layout is chosen for; it works for any number."""


class PackedLinear(nn.Module):
    """`nn.Linear` without gradient, its weight in the blocked layout that oneDNN multiplies from.

    A product of a few dozen rows with a weight in the usual layout spends much of its time rearranging the weight;
    sampling makes one per layer and token. Same sums, in another order: equal to float32 rounding.
    """

    def __init__(self, bias_O: Tensor | None) -> None:
        super().__init__()
        self.bias = bias_O
        self.packed: Tensor | None = None

    def pack(self, weight_OI: Tensor) -> None:
        """Take over a weight, float32."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight_OI, TYPICAL_ROWS)

    def release(self) -> None:
        """Let go of the weight."""
        self.packed = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return out


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN has a layout of its own for weights there, at this precision."""
    return dtype == torch.float32 and device.type == "cpu" and torch.backends.mkldnn.is_available()
