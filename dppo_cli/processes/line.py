"""A line between two processes: Python objects with tensors in them, one after the other.

What is sent is pickled, so both ends must be ours: each proves to the other that it knows a key which only the
processes of one run have.
"""

import copyreg
import io
import pickle
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

PATIENCE = 2.0
"""Seconds in which what was sent has to be read when an end is closed."""


class Line:
    """One end. Whoever waits at the other end and finds it closed gets an EOFError or an OSError.

    Messages are written in a thread: the other end may be at work, and read them later. That it is gone shows in
    `receive`.

    Example: of two ends `a` and `b`, `a.send(("loss", torch.tensor(0.5)))` has `b.receive()` return an equal tuple.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.outgoing: SimpleQueue[memoryview | None] = SimpleQueue()
        self.writing = Thread(target=self._write, daemon=True)
        self.writing.start()

    def fileno(self) -> int:
        """What `multiprocessing.connection.wait` looks at."""
        return self.connection.fileno()

    def send(self, message: Any) -> None:
        written = io.BytesIO()
        _Pickler(written, protocol=5).dump(message)
        self.outgoing.put(written.getbuffer())

    def receive(self) -> Any:
        """Waits for the next one."""
        return pickle.loads(self.connection.recv_bytes())

    def has_something(self) -> bool:
        """Whether `receive` would not wait: there is a message, or the other end is closed."""
        return self.connection.poll()

    def close(self) -> None:
        """What was sent is written before, if the other end reads it."""
        self.outgoing.put(None)
        self.writing.join(PATIENCE)
        self.connection.close()

    def _write(self) -> None:
        while (data := self.outgoing.get()) is not None:
            with suppress(OSError):
                self.connection.send_bytes(data)


class _Pickler(pickle.Pickler):
    """Tensors as arrays: torch would send all of the memory that a slice is cut from, or share it, on one machine."""

    dispatch_table = copyreg.dispatch_table.copy()
    dispatch_table[Tensor] = lambda tensor: (_tensor, (tensor.detach().cpu().numpy(),))


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array)
