"""A line between two processes: Python objects with tensors in them, one after the other.

What is sent is pickled, so both ends must be ours: each proves to the other that it knows a key which only the
processes of one run have.
"""

import copyreg
import io
import pickle
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor


class Line:
    """One end. Whoever waits at the other end and finds it closed gets an EOFError or a ConnectionError.

    Example: of two ends `a` and `b`, `a.send(("loss", torch.tensor(0.5)))` has `b.receive()` return an equal tuple.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def fileno(self) -> int:
        """What `multiprocessing.connection.wait` looks at."""
        return self.connection.fileno()

    def send(self, message: Any) -> None:
        written = io.BytesIO()
        _Pickler(written, protocol=5).dump(message)
        self.connection.send_bytes(written.getbuffer())

    def receive(self) -> Any:
        """Waits for the next one."""
        return pickle.loads(self.connection.recv_bytes())

    def close(self) -> None:
        self.connection.close()


class _Pickler(pickle.Pickler):
    """Tensors as arrays: torch would send all of the memory that a slice is cut from, or share it, on one machine."""

    dispatch_table = copyreg.dispatch_table.copy()
    dispatch_table[Tensor] = lambda tensor: (_tensor, (tensor.detach().cpu().numpy(),))


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(array)
