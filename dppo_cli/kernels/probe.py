"""A kernel is used where it is there and computes on this very device what plain operations compute."""

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
from torch import Tensor

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
    raises is a reason, too, but for memory that runs out. Autocast, which would round what the plain twin computes, is
    off.
    """
    try:
        with ExitStack() as without:
            for kind in ("cpu", *([CUDA] if torch.cuda.is_available() else [])):
                without.enter_context(torch.autocast(kind, enabled=False))
            found = difference()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # A compiler's errors are of many kinds.
        return _first_line(error)
    return None if found <= close else f"its results are {found:.2g} off"


def apart(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest difference of what was found from what was expected, relative to the largest number of each pair.

    NaN if any number is: it is no small difference.
    """
    found = [(a.double() - b.double()).abs().max() / b.double().abs().max() for a, b in pairs]
    return float(torch.stack([one.cpu() for one in found]).max())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
