"""LoRA beside the weights for sampling: W x + s B A x with copies of A and B in W's precision, made once per rollout.

PEFT converts the float32 A, B and x to W's precision at every product, and multiplies and adds in operations of their
own: eight small kernels for each layer and token. Here there are two, and layers that read one input share the first.

Shapes: I inputs, O outputs of a layer, r rank.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dppo_cli.kernels.llama import Projections, each


class Beside:
    """Makes the products of `LlamaStep`; `refresh` takes over the adapter as it is now, at the same addresses.

    Dropout is left out. Layers without an adapter, and adapters that compute something else (DoRA, several adapters,
    biases), run as the modules they are.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.copies: list[Tensor] = []
        self.sources: list[Tensor] = []

    def __call__(self, *modules: Any) -> Projections:
        if not all(_is_plain(module) for module in modules):
            return each(*modules)
        adapters = [_adapter(module) for module in modules]
        a_rI = self._copied([a for a, _, _ in adapters])
        rest = [
            (module.get_base_layer(), a.shape[0], self._copied([b]), s)
            for module, (a, b, s) in zip(modules, adapters, strict=True)
        ]

        def products(x: Tensor) -> list[Tensor]:
            low = nn.functional.linear(x.to(self.dtype), a_rI).flatten(0, -2)
            found, start = [], 0
            for base, rank, b_Or, s in rest:
                out = base(x)
                out.view(-1, out.shape[-1]).addmm_(low[:, start : start + rank], b_Or.t(), alpha=s)
                found.append(out)
                start += rank
            return found

        return products

    def refresh(self) -> None:
        if self.copies:
            torch._foreach_copy_(self.copies, [source.detach() for source in self.sources])

    def _copied(self, sources: Sequence[Tensor]) -> Tensor:
        """One below the other."""
        whole = torch.cat([source.detach() for source in sources]).to(self.dtype, copy=True)
        self.copies += whole.split([len(source) for source in sources])
        self.sources += sources
        return whole


def _is_plain(layer: Any) -> bool:
    """Whether it computes W x + b + s B A x with one adapter, and nothing else."""
    if not isinstance(layer, LoraLayer) or layer.disable_adapters or layer.merged or layer.lora_variant:
        return False
    names = layer.active_adapters
    if len(names) != 1 or layer.lora_bias.get(names[0]) or getattr(layer, "fan_in_fan_out", False):
        return False
    return all(type(part.get(names[0])) is nn.Linear for part in (_dict(layer.lora_A), _dict(layer.lora_B)))


def _dict(modules: nn.ModuleDict) -> dict[str, nn.Module]:
    return dict(modules.items())


def _adapter(layer: Any) -> tuple[Tensor, Tensor, float]:
    """A [r, I], B [O, r] and s."""
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
