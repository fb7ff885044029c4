"""The products with 4-bit weights of the GPU benchmark, with tiny shapes in Triton's interpreter."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPTS = ("gpu_nf4", "gpu_steps", "gpu_model", "measure")


def test_products(monkeypatch: pytest.MonkeyPatch):
    triton = pytest.importorskip("triton")
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    steps, model, products = (importlib.import_module(name) for name in ("gpu_steps", "gpu_model", "gpu_nf4"))
    bench = steps.Bench(model.TINY, torch.device("cpu"))
    if not triton.knobs.runtime.interpret:
        pytest.skip("a GPU runs the kernels here")
    products.STEPS["gemm_nf4"][1](bench)
    names = [row["what"].removeprefix("product, NF4, ") for row in bench.rows]
    assert names[:4] == [f"{name}, 8 rows" for name in ("q k v", "o", "gate up", "down")]
    assert names[4].startswith("q k v, 8 rows, Tiling(outputs=64") and len(names) == 5
    assert all({"fused_us", "bitsandbytes_us", "bf16_us", "share_of_floor"} <= set(row) for row in bench.rows[:4])
    assert products.shapes(model.LLAMA_8B.model)["q k v"] == ((4096, 1024, 1024), 4096)
    for name in SCRIPTS:
        sys.modules.pop(name, None)
