"""A copy of the policy's model with the adapter merged into its weights: the sampler's model, while it samples.

The policy's own weights are never written to, and every merge starts from them, so nothing drifts. What has no adapter
shares memory with the policy where the precision is the same; the merged weights are let go when the sampling ends, so
that training has their memory.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from dppo_cli.policy.head import Head
from dppo_cli.policy.policy import model_head
from dppo_cli.rollout.packed import PackedLinear, can_pack


class MergedCopy:
    """`with copy.merged() as (model, head):` is a plain transformers model with the weights W + delta W of now."""

    def __init__(self, policy_model: PreTrainedModel, dtype: torch.dtype) -> None:
        adapted = {name: m for name, m in policy_model.named_modules() if isinstance(m, LoraLinear)}
        released = {id(m.get_base_layer().weight) for m in adapted.values()}

        def stand_in(parameter: nn.Parameter) -> nn.Parameter:
            if id(parameter) in released:
                return nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            # Parameters alone: rotary frequencies are buffers, and with bfloat16's 8 bits lose the position.
            return parameter if parameter.dtype == dtype else nn.Parameter(parameter.to(dtype), requires_grad=False)

        self.model = copy.deepcopy(policy_model, memo={id(p): stand_in(p) for p in policy_model.parameters()})
        self.dtype = dtype
        self.pairs: list[tuple[LoraLinear, nn.Module]] = []
        for name, layer in adapted.items():
            own_layer = self.model.get_submodule(name)
            assert isinstance(own_layer, LoraLinear)
            plain = own_layer.get_base_layer()
            if isinstance(plain, nn.Linear) and can_pack(policy_model.device, dtype):
                plain = PackedLinear(plain.bias)
            self.model.set_submodule(name, plain)
            self.pairs.append((layer, plain))
        self.model.eval()

    @contextmanager
    def merged(self) -> Iterator[tuple[PreTrainedModel, Head]]:
        """The model and its output layer, good until the context ends."""
        try:
            with torch.no_grad():
                self._merge()
            yield self.model, self._head()
        finally:
            self._release()

    def _merge(self) -> None:
        for layer, plain in self.pairs:
            weight = _merged_weight(layer).to(self.dtype)
            if isinstance(plain, PackedLinear):
                plain.pack(weight)
            else:
                plain.weight.data = weight

    def _head(self) -> Head:
        head = model_head(self.model)
        if not can_pack(head.weight_VH.device, head.weight_VH.dtype):
            return head
        packed = PackedLinear(head.bias_V)
        packed.pack(head.weight_VH.detach())
        return replace(head, linear=packed)

    def _release(self) -> None:
        for _, plain in self.pairs:
            if isinstance(plain, PackedLinear):
                plain.release()
            else:
                plain.weight.data = torch.empty(0, dtype=self.dtype)


def _merged_weight(layer: LoraLinear) -> Tensor:
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    for adapter in layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
    return weight
