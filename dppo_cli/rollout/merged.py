"""A copy of the policy's model with the adapter merged into its weights: the sampler's model, refreshed every step.

The policy's own weights are never written to, and each refresh starts from them, so nothing drifts. Layers without an
adapter share memory with the policy where the precision is the same.
"""

import copy

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel

from dppo_cli.rollout.packed import PackedLinear, can_pack


class MergedCopy:
    """`model` is a plain transformers model; `refresh()` makes it W + delta W of the policy's model as it is now."""

    def __init__(self, policy_model: PreTrainedModel, dtype: torch.dtype) -> None:
        adapted = {name: m for name, m in policy_model.named_modules() if isinstance(m, LoraLinear)}
        own = {id(p) for m in adapted.values() for p in m.get_base_layer().parameters()}
        shared = {id(p): p for p in policy_model.parameters() if id(p) not in own and p.dtype == dtype}
        self.model = copy.deepcopy(policy_model, memo=dict(shared))
        self.pairs: list[tuple[LoraLinear, nn.Module]] = []
        for name, layer in adapted.items():
            parent, _, child = name.rpartition(".")
            own_layer = self.model.get_submodule(name)
            assert isinstance(own_layer, LoraLinear)
            plain = own_layer.get_base_layer()
            if can_pack(plain, dtype):
                plain = PackedLinear(plain.bias)
            setattr(self.model.get_submodule(parent), child, plain)
            self.pairs.append((layer, plain))
        self.model.requires_grad_(False).eval()
        # Not model.to(dtype): that would also round the buffers, and rotary frequencies with 8 bits lose the position.
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        for layer, plain in self.pairs:
            weight = layer.get_base_layer().weight
            assert isinstance(weight, torch.Tensor)
            for adapter in layer.active_adapters:
                weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            if isinstance(plain, PackedLinear):
                plain.pack(weight)
            else:
                assert isinstance(plain.weight, torch.Tensor)
                plain.weight.copy_(weight)
