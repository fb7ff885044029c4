"""Memory of this process and of its GPU, GiB: of a step, and the most of the run."""

import resource
import sys
from pathlib import Path

import torch

from dppo_cli.kernels.devices import CUDA, peak_bytes

STATUS = Path("/proc/self/status")

_earlier: dict[torch.device, float] = {}
"""The peak of each GPU, GiB, until torch last began to count anew."""


def memory_metrics(device: torch.device) -> dict[str, float]:
    """What a line of metrics.jsonl says of memory, GiB; what the system does not tell is left out.

    `process_gib`: resident memory of this process now, on Linux. `process_peak_gib`: the most since it began.
    `device_peak_gib`: the most that torch held on an NVIDIA GPU since this was last asked. Other GPUs count no peak.
    """
    found = {"process_peak_gib": _process_peak_gib()}
    if (resident := _status_gib("VmRSS")) is not None:
        found = {"process_gib": resident, **found}
    if device.type == CUDA:
        found["device_peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        _earlier[device] = max(_earlier.get(device, 0.0), found["device_peak_gib"])
        torch.cuda.reset_peak_memory_stats(device)
    return found


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: of the GPU where there is one, else resident memory of this process."""
    of_device = peak_bytes(device)
    return _process_peak_gib() if of_device is None else max(_earlier.get(device, 0.0), of_device / 2**30)


def _process_peak_gib() -> float:
    # Before getrusage, whose maximum begins with that of the process that started this one.
    if (peak := _status_gib("VmHWM")) is not None:
        return peak
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / (2**30 if sys.platform == "darwin" else 2**20)


def _status_gib(name: str) -> float | None:
    """A figure that Linux keeps of this process; None where it is not kept."""
    lines = STATUS.read_text().splitlines() if STATUS.is_file() else []
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{name}:")), None)
