"""LoRA's sum W x + s B A x, written into the frozen layer's own output instead of through four tensors of its size.

Shapes: N places, I inputs, O outputs, r rank; s = alpha / r.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn


class LeanLoraLinear(LoraLinear):
    """PEFT's layer with `add_low_rank` for the common case: one plain adapter, switched on and not merged.

    A subclass because PEFT looks its layers up by their class; its own forward does the rest.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        if self.disable_adapters or self.merged or self.lora_variant or len(names) != 1 or kwargs:
            return super().forward(x, *args, **kwargs)
        (name,) = names
        lora_a, lora_b = self.lora_A[name], self.lora_B[name]
        assert isinstance(lora_a, nn.Linear) and isinstance(lora_b, nn.Linear)
        out, x = self.base_layer(x), self.lora_dropout[name](x)
        return add_low_rank(out, x, lora_a.weight, lora_b.weight, self.scaling[name])


def make_lean(model: nn.Module) -> None:
    """Turn every plain LoRA layer of a model into a `LeanLoraLinear`. Layers on a quantised base stay PEFT's."""
    for module in model.modules():
        if type(module) is LoraLinear:
            module.__class__ = LeanLoraLinear


def add_low_rank(out_NO: Tensor, x_NI: Tensor, a_rI: Tensor, b_Or: Tensor, s: float) -> Tensor:
    """out + s (x A^T) B^T, into `out`, in its dtype; `out` and `x` may have further dimensions in front."""
    return _AddLowRank.apply(out_NO, x_NI, a_rI, b_Or, s)  # type: ignore[no-untyped-call,no-any-return]


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, a_rI: Tensor, b_Or: Tensor, s: float) -> Tensor:
        ctx.mark_dirty(out)
        ctx.s = s
        a, b = a_rI.to(out.dtype), b_Or.to(out.dtype)
        x_NI = x.flatten(0, -2).to(out.dtype)
        low_Nr = x_NI @ a.t()
        out.view(-1, out.shape[-1]).addmm_(low_Nr, b.t(), alpha=s)
        ctx.save_for_backward(x, low_Nr, a_rI, b_Or)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        x, low_Nr, a_rI, b_Or = ctx.saved_tensors
        a, b = a_rI.to(grad_out.dtype), b_Or.to(grad_out.dtype)
        grad_NO = grad_out.flatten(0, -2)
        grad_low_Nr = (grad_NO @ b).mul_(ctx.s)
        grad_x = (grad_low_Nr @ a).view_as(x).to(x.dtype) if ctx.needs_input_grad[1] else None
        grad_a = (grad_low_Nr.t() @ x.flatten(0, -2).to(grad_out.dtype)).to(a_rI.dtype)
        grad_b = (grad_NO.t() @ low_Nr).mul_(ctx.s).to(b_Or.dtype)
        return grad_out, grad_x, grad_a, grad_b, None
