"""Step of gpu.py about products with 4-bit weights: by the kernel, however it cuts, by bitsandbytes, in bfloat16."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from gpu_steps import Bench
from torch import Tensor

RANK = 32
ROWS = (8, 16, 64, 128, 256)
OTHERWISE = (8, 64)
"""Rows for which other ways to cut a product are measured, as long as there is time to compile them."""
SECONDS = 33.0
READ = 2**28
"""Bytes of codes that are read before any is read again: more than a GPU keeps."""


def shapes(of: dict[str, int]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Outputs of layers that read one input, and how many inputs."""
    hidden, inner = of["hidden_size"], of["intermediate_size"]
    query, key = of["num_attention_heads"] * of["head_dim"], of["num_key_value_heads"] * of["head_dim"]
    return {
        "q k v": ((query, key, key), hidden),
        "o": ((hidden,), query),
        "gate up": ((inner, inner), hidden),
        "down": ((hidden,), inner),
    }


def gemm_nf4(bench: Bench) -> None:
    """Microseconds of each, and the share of the time that reading the codes and scales takes."""
    try:
        import triton
    except ImportError as error:
        bench.add("product, NF4", not_run=f"{error}")
        return
    if bench.device.type != "cuda" and not triton.knobs.runtime.interpret:
        bench.add("product, NF4", not_run="without a GPU the kernel needs TRITON_INTERPRET=1")
        return
    from dppo_cli.kernels.fused.nf4 import choose

    on_cuda = bench.device.type == "cuda"
    end = time.monotonic() + SECONDS
    all_rows = ROWS if on_cuda else ROWS[:1]
    later: list[Callable[[], None]] = []
    for name, (sizes, inputs) in shapes(bench.size.model).items():
        of = _Layers(bench, sizes, inputs)
        for rows in all_rows:
            x = torch.randn(rows, inputs, device=bench.device).to(of.dtype)
            low = torch.randn(rows, RANK * len(sizes), device=bench.device).to(of.dtype)
            how = choose(sizes, inputs, rows, of.products[0].processors, of.products[0].wide)
            found = {
                "fused": _seconds(bench, [partial(product, x, low, how) for product in of.products]),
                "bitsandbytes": _seconds(bench, [partial(_each, layers, x) for layers in of.layers]),
                "bf16": _seconds(bench, [partial(torch.nn.functional.linear, x, weight) for weight in of.weights]),
            }
            floor = sum(sizes) * inputs * (0.5 + 4 / 64) / bench.copy_bandwidth()
            bench.add(
                f"product, NF4, {name}, {rows} rows",
                **{f"{kind}_us": 1e6 * seconds for kind, seconds in found.items()},
                share_of_floor=floor / found["fused"],
                splits=how.splits,
            )
            if rows in OTHERWISE:
                for other in _others(how, inputs):
                    row = f"product, NF4, {name}, {rows} rows, {other}"
                    later.append(partial(_other, bench, row, of.products, x, low, other))
    for measure in later if on_cuda else later[:1]:
        if time.monotonic() > end:
            break
        measure()


class _Layers:
    """Enough copies of layers that nothing is read from a cache, in NF4 and in 16 bits."""

    def __init__(self, bench: Bench, sizes: Sequence[int], inputs: int) -> None:
        from bitsandbytes.nn.modules import Linear4bit, Params4bit

        from dppo_cli.kernels.fused.nf4_product import Nf4Product

        make: Any = Linear4bit
        self.dtype = torch.bfloat16
        on_cuda = bench.device.type == "cuda"
        copies = -(-READ // (sum(sizes) * inputs // 2)) if on_cuda else 1
        self.layers, self.weights, self.products = [], [], []
        for _ in range(copies):
            weight = torch.randn(sum(sizes), inputs, device=bench.device).to(self.dtype)
            self.weights.append(weight)
            layers = []
            for part in weight.split(list(sizes)):
                layer = make(inputs, len(part), bias=False, compute_dtype=self.dtype, device="meta")
                quantised: Any = Params4bit(part.clone(), requires_grad=False, quant_type="nf4")
                layer.weight = quantised.to(bench.device)
                layer.support_avx512bf16_for_cpu = False
                layers.append(layer)
            b_Or = torch.zeros(sum(sizes), RANK, device=bench.device, dtype=self.dtype)
            self.layers.append(layers)
            self.products.append(Nf4Product(layers, b_Or, [1.0] * len(sizes)))


def _each(layers: Sequence[Any], x: Tensor) -> None:
    for layer in layers:
        layer(x)


def _others(how: Any, inputs: int) -> Iterator[Any]:
    """Each differs in one point."""
    steps = inputs // 128
    for splits in (how.splits // 2, how.splits * 2):
        if splits and steps and steps % splits == 0:
            yield replace(how, splits=splits)
    yield replace(how, outputs=64 if how.warps == 4 else 256)
    yield replace(how, stages=how.stages + 1)
    yield replace(how, warps=12 - how.warps)


def _other(bench: Bench, name: str, products: Sequence[Any], x: Tensor, low: Tensor, how: Any) -> None:
    try:
        seconds = _seconds(bench, [partial(product, x, low, how) for product in products])
    except RuntimeError as error:  # It needs more shared memory than there is.
        bench.add(name, not_run=next(iter(str(error).splitlines()), ""))
        return
    bench.add(name, fused_us=1e6 * seconds)


def _seconds(bench: Bench, calls: Sequence[Callable[[], object]]) -> float:
    """Of a call, one after the other; on a GPU in a graph, because launching takes longer than most of them."""

    def run() -> None:
        for call in calls:
            call()

    with torch.inference_mode():
        if bench.device.type != "cuda":
            return bench.timed(run)[0] / len(calls)
        calls[0]()  # which compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graph.replay()
        return min(bench.timed(graph.replay)[0] for _ in range(3)) / len(calls)


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {"gemm_nf4": (40, gemm_nf4)}
"""As in gpu_steps.py."""
