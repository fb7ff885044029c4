"""What is checked of products with 4-bit weights on a GPU, as functions of the device, so that a CPU runs them, too."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

import gpu_cases
import torch
from torch import Tensor

from dppo_cli.commands.schemas import TrainConfig

LLAMA_8B = (((4096, 1024, 1024), 4096), ((4096,), 4096), ((14336, 14336), 4096), ((4096,), 14336))
"""Outputs of layers that read one input, and how many inputs."""


class Layers:
    """Random ones, with an adapter of this rank."""

    def __init__(self, sizes: Sequence[int], inputs: int, device: str, dtype: torch.dtype, rank: int = 32) -> None:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit

        self.generator, self.device, self.dtype = torch.Generator().manual_seed(0), device, dtype
        self.inputs, self.rank, self.layers = inputs, rank, []
        for size in sizes:
            layer: Any = Linear4bit(inputs, size, bias=False, compute_dtype=dtype, device="meta")
            weight = 0.02 * self.random(size, inputs)
            layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
            layer.support_avx512bf16_for_cpu = False
            self.layers.append(layer)
        self.b_Or = 0.02 * self.random(sum(sizes), rank)
        self.scaling = [2.0] * len(sizes)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def weights(self) -> list[Tensor]:
        from bitsandbytes.functional import dequantize_4bit

        return [dequantize_4bit(layer.weight.data, layer.weight.quant_state) for layer in self.layers]

    def inputs_of(self, rows: int) -> tuple[Tensor, Tensor]:
        return self.random(rows, self.inputs), self.random(rows, self.rank * len(self.layers))

    def plain(self, x: Tensor, low: Tensor) -> list[Tensor]:
        """bitsandbytes' product, and the adapter added to it."""
        found, lows = [], low.split(self.rank, dim=1)
        bs = self.b_Or.split([layer.out_features for layer in self.layers])
        for layer, one, b, s in zip(self.layers, lows, bs, self.scaling, strict=True):
            found.append(layer(x).addmm_(one, b.t(), alpha=s))
        return found

    def exact(self, x: Tensor, low: Tensor) -> list[Tensor]:
        lows = low.double().split(self.rank, dim=1)
        bs = self.b_Or.double().split([layer.out_features for layer in self.layers])
        of = zip(self.weights(), lows, bs, self.scaling, strict=True)
        return [x.double() @ weight.double().t() + s * (one @ b.t()) for weight, one, b, s in of]


@torch.inference_mode()
def products_are_as_exact_as_bitsandbytes(
    device: str, dtype: torch.dtype, sizes: Sequence[int], inputs: int, all_rows: Sequence[int]
) -> dict[int, tuple[float, float]]:
    """By rows: the mean errors of the kernel and of plain operations. Equal calls give equal bits, and so do graphs."""
    from dppo_cli.kernels.fused.nf4_product import Nf4Product

    of, worst = Layers(sizes, inputs, device, dtype), {}
    before = of.weights()
    product = Nf4Product(of.layers, of.b_Or, of.scaling)
    assert all(torch.equal(a, b) for a, b in zip(of.weights(), before, strict=True))
    for rows in all_rows:
        x, low = of.inputs_of(rows)
        found, plain, right = product(x, low), of.plain(x, low), of.exact(x, low)
        apart, own = (
            float(torch.cat([(a.double() - b).abs().flatten() for a, b in zip(one, right, strict=True)]).mean())
            for one in (found, plain)
        )
        assert apart <= 1.02 * own, f"{rows} rows: mean error {apart:.3g}, bitsandbytes' {own:.3g}"
        worst[rows] = apart, own
        again = _replayed(product, x, low) if device == "cuda" else product(x, low)
        assert all(torch.equal(a, b) for a, b in zip(again, found, strict=True))
        assert not product.count.any()
    return worst


def _replayed(product: Any, x: Tensor, low: Tensor) -> list[Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = product(x, low)
    for _ in range(3):
        graph.replay()
    return list(found)


@torch.inference_mode()
def weights_are_decoded_bit_for_bit(device: str, dtype: torch.dtype, outputs: int, inputs: int) -> None:
    """Products with parts of an identity matrix."""
    from dppo_cli.kernels.fused.nf4_product import MOST_ROWS, Nf4Product

    of = Layers((outputs,), inputs, device, dtype, rank=8)
    product = Nf4Product(of.layers, torch.zeros_like(of.b_Or), of.scaling)
    for one in torch.eye(inputs, dtype=dtype, device=device).split(MOST_ROWS):
        (found,) = product(one, one[:, :8])
        at = one.argmax(1)
        assert torch.equal(found.t(), of.weights()[0][:, at])


def sampler_agrees_with_the_trainer(config: TrainConfig, device: str, dtype: str) -> tuple[float, float, int]:
    """As in gpu_cases.py, and how many launches of the kernel the host made."""
    from dppo_cli.kernels.fused.nf4_product import Nf4Product

    calls, launch = [], Nf4Product.__call__

    def counted(self: Any, *of: Any) -> list[Tensor]:
        calls.append(1)
        return launch(self, *of)

    with patch.object(Nf4Product, "__call__", counted):
        return *gpu_cases.sampler_agrees_with_the_trainer(config, device, dtype), len(calls)
