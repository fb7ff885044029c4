"""A copy of the policy's model for sampling: with the adapter merged in, or beside weights in another precision.

The policy's own weights are never written to, and every copy starts from them, so errors do not add up. Weights
without an adapter share memory with the policy where the precision is the same. The copied weights are freed when the
sampling ends, so that training has their memory.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from dppo_cli.errors import ModelError
from dppo_cli.kernels.low_rank import make_plain
from dppo_cli.kernels.memory import release_mapped
from dppo_cli.kernels.packed import PackedLinear, Siblings
from dppo_cli.kernels.products import has_onednn
from dppo_cli.policy.head import Head
from dppo_cli.policy.loading import keep_layout
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
    mode: Callable[[], AbstractContextManager[Any]]  # what model and product run in


class SamplingCopy:
    """`with copy.filled() as sampler:` samples with the weights of now, in a precision of the copy's own.

    Either W + delta W as one weight (`merge`), or W with the adapter beside it, which shares A and B with the policy.
    W is dequantised where the policy's is quantised; with `quantize` it is rounded to 4 bits where it is not. Raises
    ModelError for an adapter that PEFT cannot merge, or for layers that have no kind of 4 bits.
    """

    def __init__(self, policy_model: PreTrainedModel, dtype: torch.dtype, merge: bool, quantize: bool = False) -> None:
        self.sources = _layers(policy_model)
        self.dtype, self.merge = dtype, merge
        replaced = {id(_base(layer).weight) for layer in self.sources.values()}
        adapters = {id(p) for name, p in policy_model.named_parameters() if "lora_" in name}

        def copied(parameter: nn.Parameter) -> nn.Parameter:
            if id(parameter) in replaced:
                return nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            # Parameters alone: rotary frequencies are buffers, and with bfloat16's 8 bits lose the position.
            if id(parameter) in adapters or parameter.dtype == dtype:
                return parameter
            return nn.Parameter(parameter.to(dtype), requires_grad=False)

        self.model = copy.deepcopy(policy_model, memo={id(p): copied(p) for p in policy_model.parameters()})
        self.fills: list[tuple[list[nn.Module], nn.Module]] = []
        for names in _by_input(self.sources):
            layers = [self.sources[name] for name in names]
            if quantize:
                for name, layer in zip(names, layers, strict=True):
                    # Made once: the base never changes, and 4 bits are no burden for training.
                    self.model.set_submodule(f"{name}.base_layer", _in_4_bits(_base(layer), dtype))
                    make_plain(self.model.get_submodule(name))
                continue
            own = [_unquantised(_base(self.model.get_submodule(name))) for name in names]
            if merge and has_onednn(policy_model.device, dtype) and all(isinstance(layer, nn.Linear) for layer in own):
                packed, own = _packed(cast(list[nn.Linear], own))
                self.fills.append((layers, packed))
            else:
                self.fills += [([layer], plain) for layer, plain in zip(layers, own, strict=True)]
            for name, layer, module in zip(names, layers, own, strict=True):
                beside = not merge and isinstance(layer, LoraLayer)
                self.model.set_submodule(f"{name}.base_layer" if beside else name, module)
        self.model.eval()

    @contextmanager
    def filled(self) -> Iterator[Sampler]:
        """Good until the context ends."""
        try:
            with torch.no_grad():
                self._fill()
            # These weights are read again only in training.
            release_mapped(_base(layer).weight for layers, _ in self.fills for layer in layers)
            head = model_head(self.model)
            # The adapter beside the weights is float32, as in training.
            beside = not self.merge and self.dtype != torch.float32
            mode = partial(torch.autocast, self.model.device.type, self.dtype, enabled=beside)
            yield Sampler(self.model, head, _product(head), mode)
        finally:
            self._release()

    def _fill(self) -> None:
        for layers, target in self.fills:
            of = merged_weight if self.merge else base_weight
            weight = torch.cat([of(layer) for layer in layers]).to(self.dtype)
            if isinstance(target, PackedLinear):
                target.pack(weight)
            else:
                target.weight.data = weight

    def _release(self) -> None:
        for _, target in self.fills:
            if isinstance(target, PackedLinear):
                target.release()
            else:
                target.weight.data = torch.empty(0, dtype=self.dtype)


def _layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The layers whose weight is made anew for every sampling: those with an adapter, and quantised ones."""
    adapted: dict[str, Any] = {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}
    bases = {id(_base(layer)) for layer in adapted.values()}
    return {**adapted, **{name: m for name, m in quantised_layers(model).items() if id(m) not in bases}}


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """By their names, which end in base_layer below an adapter."""
    return {name: m for name, m in model.named_modules() if _is_quantised(m)}


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if isinstance(layer, LoraLayer) else layer


def _is_quantised(layer: nn.Module) -> bool:
    return hasattr(getattr(layer, "weight", None), "quant_state")


def _unquantised(layer: Any) -> nn.Module:
    """A plain layer for the dequantised weight of a quantised one; others as they are."""
    if isinstance(layer, nn.Linear) and type(layer) is not nn.Linear:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(layer.weight.new_empty(0, dtype=torch.float32), requires_grad=False)
        plain.bias = layer.bias
        return plain
    assert isinstance(layer, nn.Module)
    return layer


def _in_4_bits(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A layer with the same weight in NF4, as adapter=qlora loads it."""
    from bitsandbytes.nn.modules import Linear4bit, Params4bit  # Its import takes seconds.

    if not isinstance(layer, nn.Linear):
        raise ModelError(f"{type(layer).__name__} layers have no kind of 4 bits; leave rollout.weights=auto")
    make: Any = Linear4bit
    made: nn.Module = make(layer.in_features, layer.out_features, bias=False, compute_dtype=dtype, device="meta")
    weight = layer.weight.detach().to(dtype, copy=True)
    made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
    made.weight.module = made
    made.bias = layer.bias
    made.to(weight.device)  # which quantises it
    keep_layout(made)
    return made


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


def base_weight(layer: nn.Module) -> Tensor:
    """The weight below an adapter, dequantised."""
    weight = _base(layer).weight
    assert isinstance(weight, Tensor)
    if not hasattr(weight, "quant_state"):
        return weight
    from bitsandbytes.functional import dequantize_4bit  # Its import takes seconds.

    found: Tensor = dequantize_4bit(weight.data, weight.quant_state)
    return found


def merged_weight(layer: nn.Module) -> Tensor:
    """The weight with the active adapters merged in, as PEFT would merge them; the layer itself is not changed.

    W + s B A in float32 for plain LoRA; adapters that compute something else (DoRA) merge themselves. Raises ModelError
    for one that cannot.
    """
    weight = base_weight(layer)
    if not isinstance(layer, LoraLayer):
        return weight
    adapters = layer.active_adapters
    for adapter in adapters:
        if layer.lora_bias.get(adapter):
            raise ModelError("this adapter has biases, which a merged sampler would lose; use rollout.weights=adapter")
        if adapter not in layer.lora_variant:
            # In a lower precision the sum would be rounded to W's, and small updates would be lost.
            delta: Tensor = cast(Any, layer).get_delta_weight(adapter)
            weight = weight.float() + delta.float()
            continue
        variant = layer.lora_variant[adapter]
        if len(adapters) > 1:
            raise ModelError(f"{type(variant).__name__} merges alone, and {len(adapters)} adapters are active")
        try:
            # It computes from the layer's own weight, and rounds to the precision of the one it is given.
            weight = variant.merge_safe(layer, adapter, weight.float())
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError):
            raise ModelError(
                f"this adapter ({type(variant).__name__}) cannot be merged into weights; use rollout.weights=adapter"
            ) from None
    return weight
