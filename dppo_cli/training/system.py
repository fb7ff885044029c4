"""What a run was made on, for its summary."""

import platform

import torch

from dppo_cli.kernels.devices import CUDA


def system_facts(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What `auto` came to, and the system. Example of a device: `cuda:0, NVIDIA H100 80GB HBM3`."""
    card = f", {torch.cuda.get_device_name(device)}" if device.type == CUDA else ""
    return {
        "device": f"{device}{card}",
        "dtype": str(dtype).removeprefix("torch."),
        "platform": platform.platform(),
        "Python": platform.python_version(),
    }
