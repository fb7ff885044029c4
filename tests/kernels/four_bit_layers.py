"""`Linear4bit` layers on the CPU, as adapter=qlora loads them."""

from typing import Any

import torch
from torch import Tensor, nn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def layer(
    outputs: int,
    inputs: int,
    dtype: torch.dtype = torch.bfloat16,
    bias: bool = False,
    seed: int = 0,
    double: bool = True,
    **how: Any,
) -> Any:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    made: Any = Linear4bit(inputs, outputs, bias=False, compute_dtype=dtype, device="meta")
    # One block is all zeros.
    weight = random(outputs, inputs, seed=seed).to(dtype)
    weight[0, :64] = 0
    how = {"quant_type": "nf4", **how}
    made.weight = Params4bit(weight, requires_grad=False, compress_statistics=double, **how)
    made.weight.module = made
    made.support_avx512bf16_for_cpu = False  # as `keep_layout` does
    if bias:
        made.bias = nn.Parameter(random(outputs, seed=seed + 100).to(dtype), requires_grad=False)
    return made.to("cpu")


def dequantised(of: Any) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(of.weight.data, of.weight.quant_state)
