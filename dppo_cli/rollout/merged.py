"""A copy of the policy's model with the adapter merged into its weights: the sampler's model, while it samples.

The policy's own weights are never written to, and every merge starts from them, so errors do not add up. Weights
without an adapter share memory with the policy where the precision is the same. The merged weights are freed when the
sampling ends, so that training has their memory.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from transformers import PreTrainedModel

from dppo_cli.errors import ModelError
from dppo_cli.kernels.memory import release_mapped
from dppo_cli.kernels.packed import PackedLinear, Siblings
from dppo_cli.kernels.products import has_onednn
from dppo_cli.policy.head import Head
from dppo_cli.policy.policy import model_head

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What most models of transformers call the layers that read one input. Under other names each is its own product."""


@dataclass(frozen=True)
class Sampler:
    """What tokens are sampled with: a model without its output layer's product, which `product` computes.

    `head` has the output layer's own parameters, so that a report can outlive the sampler.
    """

    model: PreTrainedModel
    head: Head
    product: Callable[[Tensor], Tensor]  # W h + b, as `head.product`


class MergedCopy:
    """`with copy.merged() as sampler:` samples with the weights W + delta W of now.

    Raises ModelError for an adapter that PEFT cannot merge into weights.
    """

    def __init__(self, policy_model: PreTrainedModel, dtype: torch.dtype) -> None:
        adapted = {name: m for name, m in policy_model.named_modules() if isinstance(m, LoraLinear)}
        released = {id(m.get_base_layer().weight) for m in adapted.values()}

        def copied(parameter: nn.Parameter) -> nn.Parameter:
            if id(parameter) in released:
                return nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            # Parameters alone: rotary frequencies are buffers, and with bfloat16's 8 bits lose the position.
            return parameter if parameter.dtype == dtype else nn.Parameter(parameter.to(dtype), requires_grad=False)

        self.model = copy.deepcopy(policy_model, memo={id(p): copied(p) for p in policy_model.parameters()})
        self.dtype = dtype
        self.merges: list[tuple[list[LoraLinear], nn.Module]] = []
        for names in _by_input(adapted):
            layers = [adapted[name] for name in names]
            own = [self._own_layer(name) for name in names]
            if has_onednn(policy_model.device, dtype) and all(isinstance(layer, nn.Linear) for layer in own):
                packed, own = _packed(own)
                self.merges.append((layers, packed))
            else:
                self.merges += [([layer], plain) for layer, plain in zip(layers, own, strict=True)]
            for name, module in zip(names, own, strict=True):
                self.model.set_submodule(name, module)
        self.model.eval()

    @contextmanager
    def merged(self) -> Iterator[Sampler]:
        """Good until the context ends."""
        try:
            with torch.no_grad():
                self._merge()
            # These weights are read again only in training.
            release_mapped(layer.get_base_layer().weight for layers, _ in self.merges for layer in layers)  # type: ignore[misc]
            head = model_head(self.model)
            yield Sampler(self.model, head, _product(head))
        finally:
            self._release()

    def _merge(self) -> None:
        for layers, target in self.merges:
            weight = torch.cat([merged_weight(layer) for layer in layers]).to(self.dtype)
            if isinstance(target, PackedLinear):
                target.pack(weight)
            else:
                target.weight.data = weight

    def _own_layer(self, name: str) -> Any:
        """The copy's twin of the layer below an adapter."""
        layer = self.model.get_submodule(name)
        assert isinstance(layer, LoraLinear)
        return layer.get_base_layer()

    def _release(self) -> None:
        for _, target in self.merges:
            if isinstance(target, PackedLinear):
                target.release()
            else:
                target.weight.data = torch.empty(0, dtype=self.dtype)


def _by_input(names: Iterable[str]) -> list[list[str]]:
    """Names of layers, those together that read the same input."""
    groups: dict[tuple[str, Any], list[str]] = {}
    for name in names:
        parent, _, kind = name.rpartition(".")
        groups.setdefault((parent, next((s for s in SIBLINGS if kind in s), kind)), []).append(name)
    return list(groups.values())


def _packed(layers: Sequence[nn.Linear]) -> tuple[PackedLinear, list[nn.Module]]:
    """The one product for layers that read the same input, and the modules that replace these layers."""
    if len(layers) == 1:
        packed = PackedLinear(layers[0].bias)
        return packed, [packed]
    siblings = Siblings([m.out_features for m in layers], [m.bias for m in layers])
    return siblings.linear, list(siblings.members)


def _product(head: Head) -> Callable[[Tensor], Tensor]:
    if not has_onednn(head.weight_VH.device, head.weight_VH.dtype):
        return head.product
    packed = PackedLinear(head.bias_V)
    packed.pack(head.weight_VH.detach())
    return packed


def merged_weight(layer: LoraLinear) -> Tensor:
    """The weight with the active adapters merged in, as PEFT would merge them; the layer itself is not changed.

    W + s B A for plain LoRA; adapters that compute something else (DoRA) merge themselves. Raises ModelError for one
    that cannot.
    """
    weight = layer.get_base_layer().weight
    assert isinstance(weight, Tensor)
    adapters = layer.active_adapters
    for adapter in adapters:
        if layer.lora_bias.get(adapter):
            raise ModelError("this adapter has biases, which a merged sampler would lose; use rollout.merge=false")
        if adapter not in layer.lora_variant:
            weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
            continue
        variant = layer.lora_variant[adapter]
        if len(adapters) > 1:
            raise ModelError(f"{type(variant).__name__} merges alone, and {len(adapters)} adapters are active")
        try:
            weight = variant.merge_safe(layer, adapter, weight)
        except (NotImplementedError, RuntimeError):
            raise ModelError(
                f"this adapter ({type(variant).__name__}) cannot be merged into weights; use rollout.merge=false"
            ) from None
    return weight
