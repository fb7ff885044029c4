"""A copy of the policy's model with the adapter merged into its weights: the sampler's model, refreshed every step.

The policy's own weights are never written to, and each refresh starts from them, so nothing drifts. Layers without an
adapter share memory with the policy where the precision is the same.
"""

import copy

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel


class MergedCopy:
    """`model` is a plain transformers model; `refresh()` makes it W + delta W of the policy's model as it is now."""

    def __init__(self, policy_model: PreTrainedModel, dtype: torch.dtype) -> None:
        adapted = {name: m for name, m in policy_model.named_modules() if isinstance(m, LoraLayer)}
        own = {id(p) for m in adapted.values() for p in m.get_base_layer().parameters()}
        shared = {id(p): p for p in policy_model.parameters() if id(p) not in own}
        self.model = copy.deepcopy(policy_model, memo=dict(shared))
        self.pairs: list[tuple[LoraLayer, nn.Module]] = []
        for name, layer in adapted.items():
            parent, _, child = name.rpartition(".")
            plain = self.model.get_submodule(name).get_base_layer()
            setattr(self.model.get_submodule(parent), child, plain)
            self.pairs.append((layer, plain))
        self.model.to(dtype).requires_grad_(False).eval()

    @torch.no_grad()
    def refresh(self) -> None:
        for layer, plain in self.pairs:
            weight = layer.get_base_layer().weight
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)  # type: ignore[operator]
            plain.weight.copy_(weight)  # type: ignore[operator, union-attr]
