"""Products with frozen weights. Shapes: N rows, I inputs, O outputs."""

import torch
from torch import Tensor


def multiply(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b, in the weight's dtype, without gradient; `x` may have more dimensions before I.

    In float32 on a CPU it uses oneDNN, which torch uses only for lower precisions: for a few hundred rows it is a
    quarter to a half faster than torch's own product. For a transposed weight on a processor without AVX-512 it uses
    torch's product, because oneDNN is a third slower there. The sums are the same in another order.
    """
    x = x.to(weight_OI.dtype)
    wanted = weight_OI.dtype == torch.float32 and (weight_OI.is_contiguous() or has_avx512())
    if wanted and has_onednn(weight_OI.device, weight_OI.dtype):
        return onednn_linear(x, weight_OI, bias_O)
    return torch.nn.functional.linear(x, weight_OI, bias_O)


def logits_product(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """x W^T + b without gradient, in float32 where a product of 16-bit factors can be: on CUDA; else in W's dtype.

    Rounded to bfloat16, logits move log-probs by 0.01 to 0.03 on average. A float32 copy of W would take twice its
    memory, and tensor cores add in float32 anyway.
    """
    if not has_wide_products(weight_OI.device, weight_OI.dtype):
        return multiply(x, weight_OI, bias_O)
    x_NI = x.flatten(0, -2).to(weight_OI.dtype)
    out_NO: Tensor = torch.mm(x_NI, weight_OI.t(), out_dtype=torch.float32)
    if bias_O is not None:
        out_NO += bias_O
    return out_NO.view(*x.shape[:-1], -1)


def has_wide_products(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies 16-bit matrices into a float32 one here; AMD's GPUs are CUDA devices without it."""
    return device.type == "cuda" and dtype.itemsize == 2 and torch.version.hip is None


def has_avx512() -> bool:
    """Whether torch uses 512-bit vectors on this processor."""
    return str(torch.backends.cpu.get_cpu_capability()).startswith("AVX512")


def has_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN can compute a product on this device in this precision; bfloat16 needs a processor with it."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def emulates_bfloat16(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products are in bfloat16 on a CPU without instructions for it: some 300 times slower than float32."""
    return device.type == "cpu" and dtype == torch.bfloat16 and not has_onednn(device, dtype)


def onednn_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b, [..., I] -> [..., O], if `has_onednn`. All are of one dtype; W may come from `onednn_layout`."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight_OI, bias_O, "none", [], "")
    return out


def onednn_layout(weight_OI: Tensor, rows: int) -> Tensor:
    """A copy of a weight in the blocked layout that is fastest for this number of rows; it works for any number."""
    copy: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, rows)
    return copy
