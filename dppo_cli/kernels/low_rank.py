"""LoRA's sum W x + s B A x with a frozen W, as one operation that keeps one tensor less and adds in place.

Shapes: N positions, I inputs, O outputs, r rank; s = alpha / r.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from dppo_cli.kernels.products import multiply


class LeanLoraLinear(LoraLinear):
    """PEFT's layer with `adapted_linear` for the common case: one plain adapter, enabled and not merged.

    It is a subclass because PEFT finds its layers by their class. PEFT's forward handles all other cases.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        if self.disable_adapters or self.merged or self.lora_variant or len(names) != 1 or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = names
        if self.lora_bias[name]:
            return super().forward(x, *args, **kwargs)
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear)
        base: Any = self.base_layer
        # GPT-2's layers store W^T.
        weight_OI = base.weight.t() if self.fan_in_fan_out else base.weight
        dropped = self.lora_dropout[name](x)
        return adapted_linear(x, dropped, weight_OI, base.bias, lora_a.weight, lora_b.weight, self.scaling[name])


def make_lean(model: nn.Module) -> None:
    """Turn every plain LoRA layer of a model into a `LeanLoraLinear`, except layers on a quantised base."""
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = LeanLoraLinear


def make_plain(layer: nn.Module) -> None:
    """Undo `make_lean`, for a layer whose base is no longer a plain weight: PEFT's forward calls it."""
    if isinstance(layer, LeanLoraLinear):
        layer.__class__ = LoraLinear  # type: ignore[assignment]


def adapted_linear(
    x: Tensor, dropped: Tensor, weight_OI: Tensor, bias_O: Tensor | None, a_rI: Tensor, b_Or: Tensor, s: float
) -> Tensor:
    """x W^T + b + s (d A^T) B^T in W's dtype; x and d [..., I], out [..., O].

    `dropped`, d: the adapter's input, which is x itself, or x after dropout. W and b are frozen: they get no gradient.
    """
    return _AdaptedLinear.apply(x, dropped, weight_OI, bias_O, a_rI, b_Or, s)  # type: ignore[no-untyped-call,no-any-return]


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dropped: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        a_rI: Tensor,
        b_Or: Tensor,
        s: float,
    ) -> Tensor:
        ctx.s, ctx.same = s, dropped is x
        dtype = weight_OI.dtype
        out = multiply(x, weight_OI, bias_O)
        low_Nr = dropped.flatten(0, -2).to(dtype) @ a_rI.to(dtype).t()
        out.view(-1, out.shape[-1]).addmm_(low_Nr, b_Or.to(dtype).t(), alpha=s)
        ctx.save_for_backward(dropped, low_Nr, weight_OI, a_rI, b_Or)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        dropped, low_Nr, weight_OI, a_rI, b_Or = ctx.saved_tensors
        a, b = a_rI.to(grad_out.dtype), b_Or.to(grad_out.dtype)
        grad_NO = grad_out.flatten(0, -2).contiguous()
        grad_low_Nr = (grad_NO @ b).mul_(ctx.s)
        grad_a = (grad_low_Nr.t() @ dropped.flatten(0, -2).to(grad_out.dtype)).to(a_rI.dtype)
        grad_b = (grad_NO.t() @ low_Nr).mul_(ctx.s).to(b_Or.dtype)
        grad_x = grad_dropped = None
        if ctx.needs_input_grad[0]:
            grad_x = multiply(grad_NO, weight_OI.t())
            if ctx.same:
                grad_x.addmm_(grad_low_Nr, a)
            else:
                grad_dropped = (grad_low_Nr @ a).view_as(dropped).to(dropped.dtype)
            grad_x = grad_x.view_as(dropped).to(dropped.dtype)
        return grad_x, grad_dropped, None, None, grad_a, grad_b, None
