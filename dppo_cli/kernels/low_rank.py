"""LoRA's sum W x + s B A x with a frozen W, as one operation that keeps one tensor less and adds in place.

PEFT's layers convert x to the adapter's float32 and back, and multiply and add in operations of their own: 30% of the
time of a bfloat16 update's kernels on an H100. A W in 4 bits is dequantised for each product and not kept.

Shapes: N positions, I inputs, O outputs, r rank; s = alpha / r.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.four_bits import dequantizer, is_4_bit
from dppo_cli.kernels.products import multiply

Restore = Callable[[Tensor], Tensor]
"""What a weight is when it is multiplied, of what is stored."""


class _Lean(nn.Module):
    """PEFT's layer with `adapted_linear` for the common case: one plain adapter, enabled and not merged.

    What is made of it is a subclass because PEFT finds its layers by their class. PEFT's forward handles all other
    cases.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        of: Any = self
        names = of.active_adapters
        if of.disable_adapters or of.merged or of.lora_variant or len(names) != 1 or kwargs:
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        (name,) = names
        base: Any = of.base_layer
        in_4_bits = is_4_bit(base)
        restore = dequantizer(base) if in_4_bits else getattr(base, "restore", None)
        if of.lora_bias[name] or (in_4_bits and restore is None):
            return super().forward(x, *args, **kwargs)  # type: ignore[no-any-return]
        lora_a, lora_b = of.lora_A[name], of.lora_B[name]
        assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear)
        # GPT-2's layers store W^T.
        weight = base.weight.t() if of.fan_in_fan_out else base.weight
        dropped = of.lora_dropout[name](x)
        return adapted_linear(x, dropped, weight, base.bias, lora_a.weight, lora_b.weight, of.scaling[name], restore)


class LeanLoraLinear(_Lean, LoraLinear):
    """See `_Lean`. `restore` of its base, if there is one, says what to make of the weight."""


@cache
def lean_4_bit() -> tuple[type[nn.Module], type[nn.Module]]:
    """PEFT's layer on a 4-bit base, and the lean one. Made when asked for: bitsandbytes' import takes seconds."""
    from peft.tuners.lora.bnb import Linear4bit

    return Linear4bit, type("LeanLora4bit", (_Lean, Linear4bit), {"__module__": __name__})


def make_lean(model: nn.Module, device: torch.device) -> None:
    """Turn every plain LoRA layer of a model into a `LeanLoraLinear`, and those on a 4-bit base where that is on a GPU.

    On a CPU bitsandbytes multiplies with 4-bit weights in ways of its own.
    """
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = LeanLoraLinear
        elif device.type == CUDA and is_4_bit(getattr(module, "base_layer", None)):
            plain, lean = lean_4_bit()
            if type(module) is plain:
                module.__class__ = lean


def make_plain(layer: nn.Module) -> None:
    """Undo `make_lean`, for a layer whose base is no longer a plain weight: PEFT's forward calls it."""
    if isinstance(layer, LeanLoraLinear):
        layer.__class__ = LoraLinear  # type: ignore[assignment]


def adapted_linear(
    x: Tensor,
    dropped: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    a_rI: Tensor,
    b_Or: Tensor,
    s: float,
    restore: Restore | None = None,
) -> Tensor:
    """x W^T + b + s (d A^T) B^T in W's dtype; x and d [..., I], out [..., O].

    `dropped`, d: the adapter's input, which is x itself, or x after dropout. `weight`: W [O, I], or what `restore`
    makes W of. W and b are frozen: they get no gradient.
    """
    return _AdaptedLinear.apply(x, dropped, weight, bias_O, a_rI, b_Or, s, restore)  # type: ignore[no-untyped-call,no-any-return]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        weight: Tensor,
        bias_O: Tensor | None,
        a_rI: Tensor,
        b_Or: Tensor,
        s: float,
        restore: Restore | None,
    ) -> Tensor:
        ctx.s, ctx.same, ctx.restore = s, dropped is x, restore
        weight_OI = weight if restore is None else restore(weight)
        dtype = weight_OI.dtype
        out = multiply(x, weight_OI, None if bias_O is None else bias_O.to(dtype))
        low_Nr = dropped.flatten(0, -2).to(dtype) @ a_rI.to(dtype).t()
        out.view(-1, out.shape[-1]).addmm_(low_Nr, b_Or.to(dtype).t(), alpha=s)
        ctx.save_for_backward(dropped, low_Nr, weight, a_rI, b_Or)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        dropped, low_Nr, weight, a_rI, b_Or = ctx.saved_tensors
        a, b = a_rI.to(grad_out.dtype), b_Or.to(grad_out.dtype)
        grad_NO = grad_out.flatten(0, -2).contiguous()
        grad_low_Nr = (grad_NO @ b).mul_(ctx.s)
        grad_a = (grad_low_Nr.t() @ dropped.flatten(0, -2).to(grad_out.dtype)).to(a_rI.dtype)
        grad_b = (grad_NO.t() @ low_Nr).mul_(ctx.s).to(b_Or.dtype)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            weight_OI = weight if ctx.restore is None else ctx.restore(weight)
            grad_x = multiply(grad_NO, weight_OI.t())
            if ctx.same:
                grad_x.addmm_(grad_low_Nr, a)
            else:
                grad_dropped = (grad_low_Nr @ a).view_as(dropped).to(dropped.dtype)
            grad_x = grad_x.view_as(dropped).to(dropped.dtype)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None, None
