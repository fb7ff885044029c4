"""CUDA graphs: a function's kernels are recorded once and then launched together, without the host's work for each.

A decoding step of Llama 3.1 8B launches over a thousand kernels. That takes the host longer than it takes the device to
run them.
"""

import gc
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache

import torch

from dppo_cli.kernels.devices import CUDA, empty_cache

FALLS_BACK = "sampling steps could not be recorded as CUDA graphs ({}), so each kernel is launched by itself: slower"


class Graphs:
    """`graphs(key, function)` runs a function, and replays it where it was called with this key before.

    A function reads and writes only tensors that stay where they are, gives nothing back, does not wait for the device,
    and does the same for each call with a key. All graphs share one pool of memory, because they run one after the
    other. On other devices than CUDA the function is called. Where recording fails, it is called from then on, too, and
    `warn` is told.
    """

    def __init__(self, device: torch.device, warn: Callable[[str], None]) -> None:
        self.device, self.warn = device, warn
        self.recorded: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self.records = device.type == CUDA
        self.stream = _recording_stream(device) if self.records else None

    def __call__(self, key: Hashable, function: Callable[[], None]) -> None:
        if key in self.recorded:
            self.recorded[key].replay()
        elif not self.records:
            function()
        else:
            self._run_and_record(key, function)

    def release(self) -> None:
        """Give back the memory of all graphs; they are recorded anew when they are needed."""
        if not self.recorded:
            return
        for graph in self.recorded.values():
            graph.reset()
        self.recorded.clear()
        # The allocator puts the memory of a graph to no other use before it was given back.
        empty_cache(self.device)

    def _run_and_record(self, key: Hashable, function: Callable[[], None]) -> None:
        assert self.stream is not None
        # The call itself is the warm-up: libraries choose kernels and allocate workspaces in it. On the stream that
        # records, so that these workspaces are its own.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            function()
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        pool = next((one.pool() for one in self.recorded.values()), None)
        try:
            # The process's other threads, such as those of rewards, may go on using the device.
            recording = torch.cuda.graph(graph, pool, self.stream, capture_error_mode="thread_local")
            with _undisturbed(), recording:
                function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.records = False
            self.warn(FALLS_BACK.format(next(iter(str(error).splitlines()), type(error).__name__)))
            return
        self.recorded[key] = graph


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace of 32 MiB for each stream that it was ever used on."""
    return torch.cuda.Stream(device)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """While recording, nothing is freed by the garbage collector, and autocast makes no copy that only it knows of."""
    collects, keeps = gc.isenabled(), torch.is_autocast_cache_enabled()
    gc.disable()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(keeps)
        if collects:
            gc.enable()
