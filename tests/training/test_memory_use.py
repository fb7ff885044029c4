"""Memory of a step and of a run: what Linux and CUDA count, and what is left out elsewhere."""

import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from dppo_cli.training import memory_use
from dppo_cli.training.memory_use import memory_metrics, peak_memory_gib

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
GIB = 2**30

REPORT = """
import torch
from dppo_cli.training.memory_use import peak_memory_gib
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


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that tells how much is resident")
def test_a_step_on_a_cpu() -> None:
    """The process after the step, and its peak so far, which stays when memory is given back."""
    before = memory_metrics(CPU)
    assert set(before) == {"process_gib", "process_peak_gib"}
    held = torch.ones(2**27)
    during = memory_metrics(CPU)
    assert during["process_gib"] - before["process_gib"] == pytest.approx(held.nbytes / GIB, abs=0.05)
    del held
    after = memory_metrics(CPU)
    assert after["process_gib"] == pytest.approx(before["process_gib"], abs=0.05)
    assert after["process_peak_gib"] >= during["process_gib"] > after["process_gib"]


@pytest.fixture
def status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /proc/self/status."""
    path = tmp_path / "status"
    path.write_text("Name:\tdppo\nVmHWM:\t 3145728 kB\nVmRSS:\t 1048576 kB\n")
    monkeypatch.setattr(memory_use, "STATUS", path)
    return path


def test_units(status: Path) -> None:
    assert memory_metrics(CPU) == {"process_gib": 1.0, "process_peak_gib": 3.0}
    assert peak_memory_gib(CPU) == 3.0


@pytest.mark.parametrize(("system", "unit"), [("darwin", 1), ("freebsd14", 1024)])
@pytest.mark.parametrize("there", [False, True], ids=["no file", "without the figures"])
def test_where_linux_does_not_count(
    system: str, unit: int, there: bool, status: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is resident now is not told. The peak is in bytes on a Mac, in KiB elsewhere."""
    status.write_text("Name:\tdppo\n") if there else status.unlink()
    usage = namedtuple("usage", "ru_maxrss")
    monkeypatch.setattr("resource.getrusage", lambda _: usage(2 * GIB // unit))
    monkeypatch.setattr(sys, "platform", system)
    assert memory_metrics(CPU) == {"process_peak_gib": 2.0}
    assert peak_memory_gib(CPU) == 2.0


def test_a_gpu_counts_anew_at_each_step_and_the_run_keeps_the_most(
    status: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = [5 * GIB]
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: counter[0])
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: counter.__setitem__(0, GIB))
    monkeypatch.setattr(memory_use, "_earlier", {})
    assert peak_memory_gib(CUDA) == 5.0
    assert memory_metrics(CUDA) == {"process_gib": 1.0, "process_peak_gib": 3.0, "device_peak_gib": 5.0}
    assert memory_metrics(CUDA)["device_peak_gib"] == 1.0
    assert peak_memory_gib(CUDA) == 5.0
    counter[0] = 7 * GIB
    assert peak_memory_gib(CUDA) == 7.0


def test_a_mac_counts_no_peak_of_its_gpu(status: Path) -> None:
    assert "device_peak_gib" not in memory_metrics(torch.device("mps"))
