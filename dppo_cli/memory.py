"""Memory that the C library keeps after it was freed."""

import ctypes
import sys
from functools import cache
from typing import Any

WORTH_IT = 512 * 2**20
"""Bytes. Below this, asking the system for the same pages again costs a small model more time than they are worth."""
FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]


class _HeapInfo(ctypes.Structure):
    """glibc's struct mallinfo2; `fordblks` is what it holds free, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def give_back() -> None:
    """Return freed memory to the system if there is much of it and the C library is glibc.

    Sampling and training ask for tensors of different sizes, and what one has freed lies in pieces that the other
    cannot use. Costs a tenth of a second per GiB.
    """
    library = _glibc()
    if library is not None and library.mallinfo2().fordblks > WORTH_IT:
        library.malloc_trim(0)


@cache
def _glibc() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _HeapInfo
    return library
