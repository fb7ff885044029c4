"""The traces of the GPU benchmark on a CPU, with tiny shapes."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")
SCRIPTS = ("gpu_trace", "gpu_decode", "gpu_steps", "gpu_model", "measure")


@pytest.mark.parametrize(
    ("step", "name", "kernel"),
    [
        ("trace_nf4", "decode NF4, 4 rows, 17 tokens", "bitsandbytes::dequantize_4bit"),
        ("trace_update", "update bf16", "aten::addmm_"),
    ],
)
def test_traces(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str, name: str, kernel: str) -> None:
    """Each kernel is listed with its calls and their time, those that take most first."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    trace, steps, model = (importlib.import_module(name) for name in ("gpu_trace", "gpu_steps", "gpu_model"))
    monkeypatch.setattr(trace, "SHOWN", 1000)
    bench = steps.Bench(model.TINY, torch.device("cpu"), out=tmp_path)
    trace.STEPS[step][1](bench)
    row = bench.rows[-1]
    assert row["what"] == f"kernels of {name}" and 0 < row["busy_ms"] < row["ms"]
    (file,) = (path for path in tmp_path.iterdir() if path.name.startswith(name.replace(", ", "_").replace(" ", "_")))
    lines = [line.split(maxsplit=3) for line in file.read_text().splitlines()[1:]]
    times, calls = [float(line[0]) for line in lines], [int(line[2]) for line in lines]
    assert times == sorted(times, reverse=True) and sum(times) == pytest.approx(row["busy_ms"], rel=0.05)
    assert sum(calls) == row["calls"] and kernel in {line[3].strip() for line in lines}
    for name in SCRIPTS:
        sys.modules.pop(name, None)
