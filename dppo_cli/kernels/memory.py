"""Release of resident memory: freed memory that the C library keeps, and weights that are not read for some time."""

import ctypes
import mmap
import sys
from bisect import bisect
from collections.abc import Iterable
from functools import cache
from typing import Any

from torch import Tensor

WORTH_IT = 512 * 2**20
"""Bytes. A run does not return less, because a small model would lose too much time by requesting the pages again."""
FIELDS = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]

WORTH_RELEASING = 64 * 2**20
"""Bytes. Smaller weights are not released, because finding the mapped files takes time."""


class _HeapInfo(ctypes.Structure):
    """glibc's struct mallinfo2; `fordblks` is the free memory that it holds, in bytes."""

    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS]


def return_freed_memory(worth_it: int | None = None) -> None:
    """Return freed memory to the system if it is more than `worth_it` bytes and the C library is glibc.

    Sampling and training use tensors of different sizes, so the memory that one has freed is fragmented for the other.
    Returning it takes a tenth of a second per GiB; requesting the same pages again takes up to a second.
    """
    library = _glibc()
    if library is not None and library.mallinfo2().fordblks > (WORTH_IT if worth_it is None else worth_it):
        library.malloc_trim(0)


def release_mapped(weights: Iterable[Tensor]) -> None:
    """Release the resident memory of weights that are mapped from a file and not read for some time.

    safetensors maps a checkpoint into memory, so weights that were not converted are read from the page cache at the
    next access, in a tenth of a second per GiB. Other weights are not released: those without a file, and mappings in
    which a page was modified. Does nothing on systems other than Linux.
    """
    library = _libc()
    weights = [weight for weight in weights if weight.device.type == "cpu"]
    if library is None or sum(weight.nbytes for weight in weights) < WORTH_RELEASING:
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
    """Address ranges of this process that map files and are unmodified, in ascending order."""
    found: list[tuple[int, int]] = []
    with open("/proc/self/smaps") as lines:
        for line in lines:
            first, *fields = line.split()
            if not first.endswith(":"):
                start, end = (int(address, 16) for address in first.split("-"))
                is_file = fields[3] != "0"
            # A modified page of a private mapping counts as anonymous. An unmodified file mapping has none.
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
