"""The memory that a run says it held."""

import subprocess
import sys

import pytest
import torch

REPORT = """
import torch
from dppo_cli.telemetry.metrics import peak_memory_gib
before = peak_memory_gib(torch.device("cpu"))
torch.ones(2**27)
print(before, peak_memory_gib(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process begins with its parent's peak")
def test_the_peak_is_this_process_own() -> None:
    """Half a GiB given back at once still counts; what the starting process holds, here a GiB, does not."""
    held = torch.ones(2**28)
    done = subprocess.run([sys.executable, "-c", REPORT], capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert held.nbytes == 2**30
    assert 0.1 < before < 0.9
    assert after - before == pytest.approx(0.5, abs=0.05)
