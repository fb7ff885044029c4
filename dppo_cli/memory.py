"""Memory that the C library keeps after it was freed."""

import ctypes
import sys
from functools import cache


def give_back() -> None:
    """Return freed memory to the system, where the C library is glibc; elsewhere nothing happens.

    Sampling and training ask for tensors of different sizes, and what one has freed lies in pieces that the other
    cannot use. Costs a tenth of a second per GiB.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
