"""Layers in NF4 that read one input, computed by the kernel of `fused.nf4`, and whether it computes well here.

Shapes: R rows, I inputs, O outputs of a layer, r rank.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import triton
from torch import Tensor

from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.four_bits import MOST_ROWS as MOST_ROWS
from dppo_cli.kernels.four_bits import biases_of, scales_of
from dppo_cli.kernels.fused.nf4 import FEW, Tiling, choose, nf4_product, words_of
from dppo_cli.kernels.joined import joined
from dppo_cli.kernels.probe import apart

MOST_LAYERS = 3
"""That read one input."""
CLOSE = 2**-6
"""Of numbers near 1 in bfloat16, whose sums were rounded in another order."""
H100 = 132
"""Its multiprocessors, where there is no GPU to ask."""


class Nf4Product:
    """x W^T + bias + s low B^T of `Linear4bit` layers that read one input, at most `MOST_LAYERS` of them.

    Their codes become views of one tensor, which takes no more memory; scales are copied to float32, a sixteenth of a
    byte a weight. `b_Or`: all layers' B, one below the other, read at each call; `scaling`: each layer's s.
    """

    def __init__(self, layers: Sequence[Any], b_Or: Tensor, scaling: Sequence[float]) -> None:
        import bitsandbytes.functional as functional  # Its import takes seconds.

        weights = [layer.weight for layer in layers]
        device = weights[0].device
        self.weights = weights
        self.codes = joined(weights)
        self.sizes = [int(weight.quant_state.shape[0]) for weight in weights]
        self.inputs = int(weights[0].quant_state.shape[1])
        with torch.inference_mode(weights[0].is_inference()):
            self.absmax = torch.cat([scales_of(weight.quant_state) for weight in weights])
            self.table: Tensor = cast(Any, functional).get_4bit_type("nf4", device=device)
            self.scaling = torch.tensor(scaling, dtype=torch.float32, device=device)
            bias = biases_of(layers)
            self.bias = None if bias is None else bias.to(b_Or.dtype)
            # Left at zero by every launch.
            places = sum(triton.cdiv(size, 16) for size in self.sizes) * triton.cdiv(MOST_ROWS, 16)
            self.count = torch.zeros(places, dtype=torch.int32, device=device)
        self.b_Or = b_Or
        on_cuda = device.type == CUDA
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count if on_cuda else H100
        # Hopper's tensor cores take two inputs after each other from a thread, Triton gives the older ones four.
        self.wide = on_cuda and torch.cuda.get_device_capability(device)[0] != 9

    def __call__(self, x: Tensor, low: Tensor, tiling: Tiling | None = None) -> list[Tensor]:
        """x [..., I] and low [..., r of each layer, side by side] in 16 bits, at most `MOST_ROWS`; [..., O] each."""
        x_RI = x.reshape(-1, self.inputs).contiguous()
        low_Rr = low.reshape(len(x_RI), -1).contiguous()
        rows, outputs, rank = len(x_RI), sum(self.sizes), self.b_Or.shape[1]
        how = tiling or choose(self.sizes, self.inputs, rows, self.processors, self.wide)
        words = words_of(self.inputs)
        tiles = sum(triton.cdiv(size, how.outputs) for size in self.sizes)
        blocks = triton.cdiv(rows, how.rows)
        out_RO = x.new_empty(rows, outputs)
        parts = how.splits * tiles * blocks * how.outputs * how.rows if how.splits > 1 else 0
        nf4_product[tiles, how.splits, blocks](
            *(x_RI, self.codes.view(-1).view(torch.int32), self.absmax, self.table, low_Rr, self.b_Or, self.scaling),
            self.table if self.bias is None else self.bias,
            *(out_RO, x.new_empty(parts, dtype=torch.float32), self.count, rows),
            INPUTS=self.inputs,
            **dict(zip(("SIZE_0", "SIZE_1", "SIZE_2"), (*self.sizes, 0, 0), strict=False)),
            RANK=rank,
            BIAS=self.bias is not None,
            OUTPUT_BLOCK=how.outputs,
            ROW_BLOCK=how.rows,
            SPLITS=how.splits,
            WORDS=words,
            WARPS=how.warps,
            STAGES=how.stages,
            WIDE=self.wide or how.rows == FEW,
            FULL=rows % how.rows == 0,
            num_warps=how.warps,
        )
        return list(out_RO.view(*x.shape[:-1], outputs).split(self.sizes, dim=-1))


def difference(device: torch.device, dtype: torch.dtype) -> float:
    """The largest, relative to the largest output, from dequantised weights in float64: two layers, both tiles."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    layers: list[Any] = []
    for outputs in (192, 64):
        codes, state = quantize_4bit(random(outputs, 512), compress_statistics=True, quant_type="nf4")
        layer: Any = cast(Any, Linear4bit)(
            512, outputs, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        layer.weight = Params4bit(codes, False, state, quant_type="nf4", bnb_quantized=True)
        layers.append(layer)
    x, low, b_Or = random(5, 512), random(5, 16), random(256, 8)
    plain = []
    for i, layer in enumerate(layers):
        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        base = (x.double() @ weight.double().t()).to(dtype)
        b = b_Or[:192] if i == 0 else b_Or[192:]
        plain.append(base.double() + 0.5 * (low[:, 8 * i : 8 * i + 8].double() @ b.double().t()))
    expected = torch.cat(plain, dim=1)
    product = Nf4Product(layers, b_Or, [0.5, 0.5])
    tried = (product(x, low, Tiling(rows=rows, splits=splits)) for rows in (FEW, 16) for splits in (1, 2))
    return apart((torch.cat(found, dim=1), expected) for found in tried)
