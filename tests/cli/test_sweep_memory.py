"""What the jobs of a sweep leave in the memory of the process that they share."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import run
from typing import Any

import pytest

from dppo_cli.cli.hydra_job import HydraJob
from dppo_cli.cli.main import main
from dppo_cli.kernels import memory

pytestmark = pytest.mark.skipif(memory._glibc() is None, reason="the C library is not glibc 2.33 or later")

PRODUCTS = """
import torch
from dppo_cli.cli.main import main
from dppo_cli.kernels.memory import _glibc
from dppo_cli.kernels.products import onednn_linear
main(["train", "--cfg", "job"])
torch.set_num_threads(1)
weight_OI = torch.zeros(64, 64)
for rows in range(1, 301):
    onednn_linear(torch.zeros(rows, 64), weight_OI, None)
    if rows == 150:
        before = _glibc().mallinfo2().uordblks
print((_glibc().mallinfo2().uordblks - before) / 2**20)
"""
"""MiB by which what oneDNN keeps grows from 150 to 300 numbers of rows."""


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """MiB that the C library has given out, after each job of the sweeps that the test runs."""
    held: list[float] = []
    job: Callable[..., Any] = HydraJob._job

    def measured(self: HydraJob, *args: Any) -> Any:
        try:
            return job(self, *args)
        finally:
            gc.collect()
            held.append(memory._glibc().mallinfo2().uordblks / 2**20)

    monkeypatch.setattr(HydraJob, "_job", measured)
    return held


def test_a_job_leaves_little_behind(work: Path, held: list[float]) -> None:
    """The jobs have the same seed, so that oneDNN meets no new number of rows. Hydra keeps each job's config."""
    small = ["steps=1", "batch.prompts_per_step=2", "batch.prompts_per_update=2", "data.eval_problems=2"]
    assert main(["train", "-m", f"optim.lr={','.join(f'{n}e-12' for n in range(1, 5))}", *small]) == 0
    assert len(held) == 4
    assert (held[3] - held[1]) / 2 < 0.7, f"MiB after each job: {[round(size, 1) for size in held]}"


def test_onednn_forgets_products() -> None:
    """It keeps them in one cache and torch in another; a product is freed when neither has it."""
    unset = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    done = run([sys.executable, "-c", PRODUCTS], capture_output=True, text=True, timeout=100, check=True, env=unset)
    assert float(done.stdout.splitlines()[-1]) < 10
