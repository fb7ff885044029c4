"""Linear layers for token-by-token sampling on a CPU. Shapes: I input, O output size of a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dppo_cli.kernels.products import onednn_layout, onednn_linear

TYPICAL_ROWS = 64
"""Number of sequences in a sub-batch for which the layout is chosen; it works for any number."""


class PackedLinear(nn.Module):
    """`nn.Linear` without gradient, with its weight in oneDNN's blocked layout.

    A product of a few dozen rows with a weight in the usual layout spends much of its time rearranging the weight, and
    sampling computes one such product per layer and token. The sums are the same in another order: equal to rounding.
    """

    def __init__(self, bias_O: Tensor | None) -> None:
        super().__init__()
        self.bias = bias_O
        self.packed: Tensor | None = None

    def pack(self, weight_OI: Tensor) -> None:
        """Store a packed copy of a weight, in a precision that `has_onednn` accepts."""
        self.packed = onednn_layout(weight_OI, TYPICAL_ROWS)

    def release(self) -> None:
        """Free the packed weight."""
        self.packed = None

    def forward(self, x: Tensor) -> Tensor:
        assert self.packed is not None
        return onednn_linear(x, self.packed, self.bias)


class Siblings:
    """Layers that read the same input, such as a query, a key and a value projection, as one product.

    `members` replace the layers in the model. The first member that is called with an input computes the product for
    all members. A member that is called with a different input computes a new product. So the choice of layers changes
    the speed, not the result.
    """

    def __init__(self, sizes: Sequence[int], biases: Sequence[Tensor | None]) -> None:
        self.sizes = list(sizes)
        whole = None
        given = next((bias for bias in biases if bias is not None), None)
        if given is not None:
            parts = zip(sizes, biases, strict=True)
            whole = torch.cat([given.new_zeros(n) if b is None else b.detach() for n, b in parts])
        self.linear = PackedLinear(whole)
        self.members = [Sibling(self, i) for i in range(len(sizes))]
        self.input: Tensor | None = None
        self.outputs: dict[int, Tensor] = {}

    def output(self, x: Tensor, member: int) -> Tensor:
        """Each output is returned once, so an input tensor that was changed in place is treated as a new input."""
        if x is not self.input or member not in self.outputs:
            self.input = x
            self.outputs = dict(enumerate(self.linear(x).split_with_sizes(self.sizes, dim=-1)))
        out = self.outputs.pop(member)
        if not self.outputs:
            self.input = None
        return out


class Sibling(nn.Module):
    """One member of `Siblings`."""

    def __init__(self, siblings: Siblings, member: int) -> None:
        super().__init__()
        self.siblings, self.member = siblings, member

    def forward(self, x: Tensor) -> Tensor:
        return self.siblings.output(x, self.member)
