"""LoRA beside the weights for sampling: W x + s B A x with copies of A and B in W's precision, made once per rollout.

PEFT converts the float32 A, B and x to W's precision at every product, and multiplies and adds in operations of their
own: eight small kernels for each layer and token. Here there are two, and layers that read one input share the first.
On a GPU they share the product with W, too, in which A's rows are rows of W, and `fused.adapter_up` adds s B (A x) for
all of them. Weights in 4 bits are multiplied as they are, by `fused.nf4`.

Shapes: I inputs, O outputs of a layer, r rank.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from dppo_cli.kernels.devices import CUDA, empty_cache
from dppo_cli.kernels.four_bits import biases_of, is_4_bit, why_not
from dppo_cli.kernels.joined import are_joined, joined
from dppo_cli.kernels.probe import refused, without_triton
from dppo_cli.kernels.token_step import Projections, each

NOT_FUSED = "products with 4-bit weights take several times as long as they could: {}"
NOT_AT_ONCE = "the adapter takes a kernel for each layer, because the one for several layers does not work here: {}"
ROWS = 64
"""The rows of A behind the weights are filled up with zeros to a multiple of it, which products on GPUs like."""


class Beside:
    """Makes the products of `TokenStep`; `refresh` takes over the adapter as it is now, at the same addresses.

    Dropout is left out. Layers without an adapter, and adapters that compute something else (DoRA, several adapters,
    biases), run as the modules they are. `warn` is told, once each, if products in 4 bits should be fused, or adapters
    be added at once, and cannot be.
    """

    def __init__(self, dtype: torch.dtype, warn: Callable[[str], None] = lambda _: None) -> None:
        self.dtype, self.warn = dtype, warn
        self.copies: list[Tensor] = []
        self.sources: list[Tensor] = []
        self.wholes: list[tuple[list[nn.Parameter], Tensor]] = []
        self.said: set[str] = set()

    def __call__(self, *modules: Any) -> Projections:
        if not all(_is_plain(module) for module in modules):
            return each(*modules)
        adapters = [_adapter(module) for module in modules]
        bases = [module.get_base_layer() for module in modules]
        bs, scaling = [b for _, b, _ in adapters], [s for _, _, s in adapters]
        ranks = [len(a) for a, _, _ in adapters]
        # One below the other where they can be.
        whole_Or = self._copied(bs) if len(set(ranks)) == 1 else None
        b_Ors = [self._copied([b]) for b in bs] if whole_Or is None else whole_Or.split([len(b) for b in bs])
        if all(
            type(base) is nn.Linear and base.weight.dtype == self.dtype and _may_move(base.weight) for base in bases
        ):
            return self._in_one(bases, [a for a, _, _ in adapters], whole_Or, b_Ors, scaling)
        a_rI = self._copied([a for a, _, _ in adapters])
        lows = [slice(sum(ranks[:i]), sum(ranks[: i + 1])) for i in range(len(ranks))]
        fused: list[tuple[Any, slice]] = []
        most_rows = 0
        if self._fuses(bases):
            from dppo_cli.kernels.fused.nf4_product import MOST_ROWS, Nf4Product

            most_rows = MOST_ROWS
            if whole_Or is not None:
                fused = [(Nf4Product(bases, whole_Or, scaling), slice(0, sum(ranks)))]
            else:
                by_layer = zip(bases, b_Ors, scaling, strict=True)
                fused = list(zip((Nf4Product([base], b, [s]) for base, b, s in by_layer), lows, strict=True))
            self.wholes += [(product.weights, product.codes) for product, _ in fused]
        of_bases = each(*bases)

        def products(x: Tensor) -> list[Tensor]:
            x = x.to(self.dtype)
            low = nn.functional.linear(x, a_rI).flatten(0, -2)
            if len(low) <= most_rows:
                return [out for product, part in fused for out in product(x, low[:, part])]
            found = list(of_bases(x))
            _add(found, low.split(ranks, dim=1), b_Ors, scaling)
            return found

        return products

    def refresh(self) -> None:
        assert all(are_joined(parameters, whole) for parameters, whole in self.wholes), "the weights were replaced"
        if self.copies:
            torch._foreach_copy_(self.copies, [source.detach() for source in self.sources])

    def _in_one(
        self,
        bases: Sequence[Any],
        a_rIs: Sequence[Tensor],
        whole_Or: Tensor | None,
        b_Ors: Sequence[Tensor],
        scaling: Sequence[float],
    ) -> Projections:
        """One product of x with W and A of all, and one addition, if it can be, or one for each."""
        parameters, ranks = [base.weight for base in bases], [len(a) for a in a_rIs]
        sizes, room = [len(weight) for weight in parameters], -(-sum(ranks) // ROWS) * ROWS
        before, whole_OI = parameters[0].data_ptr(), joined(parameters, room)
        if parameters[0].data_ptr() != before:
            # Or parts of the freed weights would be taken for the next ones, and the rest of each stay unused.
            empty_cache(whole_OI.device)
        self.wholes.append((parameters, whole_OI))
        _, *copies, rest = whole_OI.split([sum(sizes), *ranks, room - sum(ranks)])
        for copy, a in zip(copies, a_rIs, strict=True):
            copy.copy_(a.detach())
        rest.zero_()  # which an adapter of a higher rank may have left
        self.copies += copies
        self.sources += a_rIs
        bias_O = biases_of(bases)
        if bias_O is not None:
            bias_O = nn.functional.pad(bias_O, (0, room))
        at_once = whole_Or is not None and self._at_once(whole_Or, sizes, scaling)

        def products(x: Tensor) -> list[Tensor]:
            out = nn.functional.linear(x.to(self.dtype), whole_OI, bias_O)
            parts = out.split([*sizes, *ranks, room - sum(ranks)], dim=-1)
            found = list(parts[: len(sizes)])
            if at_once:
                at_once(out)
            else:
                _add(found, [low.flatten(0, -2) for low in parts[len(sizes) : -1]], b_Ors, scaling)
            return found

        return products

    def _at_once(self, b_Or: Tensor, sizes: Sequence[int], scaling: Sequence[float]) -> Callable[[Tensor], None] | None:
        """Adds the adapters in one launch; None where there is no kernel for it."""
        device = b_Or.device
        why = without_triton(device, self.dtype)
        if why is None:
            from dppo_cli.kernels.fused.adapter_up import MOST_RANK, add_up

            if b_Or.shape[1] > MOST_RANK:
                return None
            why = _refused_up(device, self.dtype)
            if why is None:
                return lambda out: add_up(out, b_Or, sizes, scaling)
        self._say(NOT_AT_ONCE, why)
        return None

    def _say(self, what: str, why: str | None) -> None:
        if why and what not in self.said:
            self.said.add(what)
            self.warn(what.format(why))

    def _fuses(self, bases: Sequence[Any]) -> bool:
        if not all(is_4_bit(base) for base in bases):
            return False
        device = bases[0].weight.device
        why = without_triton(device, self.dtype)
        if why is None:
            reasons = (why_not(base, self.dtype) for base in bases)
            why = next((reason for reason in reasons if reason is not None), None) or _refused(device, self.dtype)
        self._say(NOT_FUSED, why)
        return why is None

    def _copied(self, sources: Sequence[Tensor]) -> Tensor:
        """One below the other."""
        whole = torch.cat([source.detach() for source in sources]).to(self.dtype, copy=True)
        self.copies += whole.split([len(source) for source in sources])
        self.sources += sources
        return whole


@cache
def _refused(device: torch.device, dtype: torch.dtype) -> str | None:
    """What the kernel's results on this device say."""
    from dppo_cli.kernels.fused.nf4_product import CLOSE, difference

    return refused(partial(difference, device, dtype), CLOSE)


@cache
def _refused_up(device: torch.device, dtype: torch.dtype) -> str | None:
    from dppo_cli.kernels.fused.adapter_up import CLOSE, difference

    return refused(partial(difference, device, dtype), CLOSE)


def _add(outs: Sequence[Tensor], lows: Sequence[Tensor], b_Ors: Sequence[Tensor], scaling: Sequence[float]) -> None:
    for out, low, b_Or, s in zip(outs, lows, b_Ors, scaling, strict=True):
        out.view(-1, out.shape[-1]).addmm_(low, b_Or.t(), alpha=s)


def _may_move(weight: Tensor) -> bool:
    """Where a few rows more or less take the same time. CPUs have layouts of their own, see packed.py."""
    return weight.device.type == CUDA and not weight.requires_grad


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
