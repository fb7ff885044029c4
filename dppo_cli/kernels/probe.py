"""A kernel is used where it is there and computes on this very device what plain operations compute."""

import importlib
import importlib.util
from collections.abc import Callable

import torch

from dppo_cli.kernels.devices import CUDA

NO_TRITON = "Triton is not installed"


def without_triton(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels in `fused` are not for a device and precision: empty where they never are, else in words."""
    if device.type != CUDA or dtype.itemsize != 2 or torch.version.hip is not None:
        return ""
    if torch.cuda.get_device_capability(device) < (8, 0):
        return ""  # bfloat16 is emulated there
    if importlib.util.find_spec("triton") is None:
        return NO_TRITON
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # of a build for another system
        return f"Triton cannot be imported: {_first_line(error)}"
    return None


def refused(difference: Callable[[], float], close: float) -> str | None:
    """Why a kernel cannot be used, in words; None if it can.

    `difference`: runs it and gives the largest difference from its plain twin, of which `close` is allowed. What it
    raises is a reason, too, but for memory that runs out.
    """
    try:
        apart = difference()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # A compiler's errors are of many kinds.
        return _first_line(error)
    return None if apart <= close else f"its results are {apart:.2g} off"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
