"""One process, or several that train one policy together."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Thread
from typing import Any

import torch
from torch import Tensor, distributed

from dppo_cli.errors import ConfigError


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes.

    Example: `World().sum([gradient])` changes nothing; in each of two that both have 3 there, it is 6 afterwards.
    """

    rank: int = 0
    size: int = 1

    @staticmethod
    @contextmanager
    def launched(device: str) -> Iterator["World"]:
        """The processes that a launcher (torchrun, accelerate launch, on one machine or several) has started.

        `device`: cuda or cpu; a process has the GPU of its number on its machine. Raises ConfigError for variables of
        the environment that cannot be used.
        """
        world = World._of_environment(device)
        try:
            yield world
        finally:
            world.leave()

    @staticmethod
    def _of_environment(device: str) -> "World":
        try:
            rank, size, local = (int(os.environ.get(name, least)) for name, least in VARIABLES)
            return World() if size == 1 else World(rank, size).joined(device, local)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the environment ({', '.join(name for name, _ in VARIABLES)}, MASTER_ADDR and the like) cannot be "
                f"used: {str(error).splitlines()[0]}"
            ) from None

    def joined(self, device: str, local: int, store: Any = None) -> "World":
        """This world, once all of it have come. `local`: number of the GPU. `store`: torch's, by which they find
        each other; None: as the environment says."""
        here = torch.device(device, local) if device == "cuda" else None
        failed: list[BaseException] = []

        def join() -> None:
            backend = "gloo" if here is None else "nccl"
            try:
                distributed.init_process_group(
                    backend, store=store, rank=self.rank, world_size=self.size, device_id=here
                )
            except BaseException as error:
                failed.append(error)

        if here is not None:
            torch.cuda.set_device(here)
        # In a thread: Python hears no signal while torch waits, and some may never come.
        joining = Thread(target=join, daemon=True)
        joining.start()
        joining.join()
        if failed:
            raise failed[0]
        return self

    def leave(self) -> None:
        """No sums any more. A process that ends without it may abort."""
        if self.size > 1:
            distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that runs the loop, writes the run folder and speaks to the user."""
        return self.rank == 0

    def sum(self, values: Iterable[Tensor]) -> None:
        """Replace each element of each tensor by its sum over all processes, in all of them."""
        if self.size > 1:
            for work in [distributed.all_reduce(value, async_op=True) for value in values]:
                work.wait()

    def told(self, value: Any) -> Any:
        """What the main process has as `value`, in all of them."""
        if self.size == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values)
        return values[0]


VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
"""Of the environment, and what holds without: which process this is, of how many, and which on its machine."""
