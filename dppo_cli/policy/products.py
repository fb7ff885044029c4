"""Products with frozen weights. Shapes: N rows, I inputs, O outputs."""

import torch
from torch import Tensor


def multiply(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, in the weight's dtype, without gradient; `x` may have further dimensions in front of I.

    In float32 on a CPU by oneDNN, which torch itself takes for lower precisions only: for some hundred rows it is a
    quarter to a half faster than torch's own product. Not so for a transposed weight on processors without AVX-512,
    where it is a third slower. The same sums in another order.
    """
    x = x.to(weight_OI.dtype)
    wanted = weight_OI.dtype == torch.float32 and (weight_OI.is_contiguous() or has_avx512())
    if wanted and has_onednn(weight_OI.device, weight_OI.dtype):
        return onednn_linear(x, weight_OI, bias_O)
    return torch.nn.functional.linear(x, weight_OI, bias_O)


def has_avx512() -> bool:
    """Whether torch found 512-bit vectors in this processor."""
    return str(torch.backends.cpu.get_cpu_capability()).startswith("AVX512")


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can be asked for a product there, at this precision: bfloat16 needs a processor that has it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def onednn_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b, [..., I] -> [..., O], where `has_onednn`; all of one dtype, W as it is or from `onednn_layout`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return out


def onednn_layout(weight_OI: Tensor, rows: int) -> Tensor:
    """A copy of a weight in the blocked layout from which oneDNN multiplies that many rows fastest, for any number."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)
    return copy
