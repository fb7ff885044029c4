"""Resident memory that nobody needs: what the C library keeps after it was freed, and weights that rest."""

import ctypes
import mmap
import sys
from bisect import bisect
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor

WORTH_IT = 512 * 2**20
"""Bytes. Below this, asking the system for the same pages again costs a small model more time than they are worth."""
FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]

WORTH_RESTING = 64 * 2**20
"""Bytes. Looking for the files behind less weight takes longer than it is worth."""


class _HeapInfo(ctypes.Structure):
    """glibc's struct mallinfo2; `fordblks` is what it holds free, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def give_back() -> None:
    """Return freed memory to the system if there is much of it and the C library is glibc.

    Sampling and training ask for tensors of different sizes, and what one has freed lies in pieces that the other
    cannot use. Going through it takes a tenth of a second per GiB, getting the same pages again up to a second.
    """
    library = _glibc()
    if library is not None and library.mallinfo2().fordblks > WORTH_IT:
        library.malloc_trim(0)


def set_aside(weights: Iterable[Tensor]) -> None:
    """Let the system have the memory of weights that are not read for a while, as far as their pages are a file's.

    safetensors maps a checkpoint into memory, so weights that were not converted come back from the page cache at the
    next access, in a tenth of a second per GiB. All others stay as they are: weights without a file behind them, and
    mappings of which a page was written to since. Does nothing on systems other than Linux.
    """
    library = _libc()
    weights = [weight for weight in weights if weight.device.type == "cpu"]
    if library is None or sum(weight.nbytes for weight in weights) < WORTH_RESTING:
        return
    mapped = _unwritten_file_mappings()
    starts = [start for start, _ in mapped]
    for weight in weights:
        begin, end = weight.data_ptr(), weight.data_ptr() + weight.nbytes
        i = bisect(starts, begin) - 1
        if i >= 0 and end <= mapped[i][1]:
            begin, end = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def _unwritten_file_mappings() -> list[tuple[int, int]]:
    """Address ranges of this process that show files as they are, ascending."""
    found: list[tuple[int, int]] = []
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first, *fields = line.split()
            if not first.endswith(":"):
                start, end = (int(address, 16) for address in first.split("-"))
                is_file = fields[3] != "0"
            # A page of a private mapping that was written to is the process's own; of a file's there are none.
            elif first == "Anonymous:" and is_file and fields[0] == "0":
                found.append((start, end))
    return found


@cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform.startswith("linux") else None


@cache
def _glibc() -> Any:
    library = _libc()
    if library is None or not hasattr(library, "mallinfo2"):
        return None
    library.mallinfo2.restype = _HeapInfo
    return library
