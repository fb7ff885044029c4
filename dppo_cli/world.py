"""One process, or several that train one policy together."""

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
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
    def launched(device: str, warn: Callable[[str], None] = print) -> Iterator["World"]:
        """The processes that a launcher (torchrun, accelerate launch, on one machine or several) has started.

        `device`: cuda or cpu; a process has the GPU of its number on its machine. `warn` hears if others do not come.
        Raises ConfigError for variables of the environment that cannot be used.
        """
        world = World._of_environment(device, warn)
        try:
            yield world
        finally:
            world.leave()

    @staticmethod
    def _of_environment(device: str, warn: Callable[[str], None]) -> "World":
        rank, size, local = (_number(name, least) for name, least in VARIABLES)
        if size == 1:
            return World()
        if rank >= size:
            raise ConfigError(f"RANK={rank} in the environment is not less than WORLD_SIZE={size}; {UNSET}")
        waited = [time.monotonic() + PATIENCE]

        def check() -> None:
            if waited and time.monotonic() > waited[0]:
                waited.clear()
                where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
                warn(f"process {rank + 1} of {size} is waiting for the others, at {where}; {UNSET}")

        try:
            return World(rank, size).joined(device, local, check=check)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the environment ({', '.join(name for name, _ in VARIABLES)}, MASTER_ADDR and the like) cannot be "
                f"used: {str(error).splitlines()[0]}; {UNSET}"
            ) from None

    def joined(self, device: str, local: int, store: Any = None, check: Callable[[], None] = lambda: None) -> "World":
        """This world, once all of it have come.

        `local`: number of this process on its machine. `store`: torch's, by which they find each other; None: as the
        environment says. `check` is called while this process waits, and may raise what ends the waiting.
        """
        here = torch.device(device, local % torch.cuda.device_count()) if device == "cuda" else None
        backend = "gloo" if here is None else "cpu:gloo,cuda:nccl"
        if here is not None:
            torch.cuda.set_device(here)
        # Processes meet under the number of the group, and a join that was given up has been counted.
        distributed.distributed_c10d._world.group_count = 0
        join = partial(
            distributed.init_process_group,
            backend,
            store=store,
            rank=self.rank,
            world_size=self.size,
            device_id=here,
        )
        _beside(join, check)
        return self

    def leave(self) -> None:
        """No sums any more. The others may be gone, for which NCCL would wait."""
        if self.size > 1 and distributed.is_initialized():
            started = time.monotonic()

            def check() -> None:
                if time.monotonic() > started + PATIENCE:
                    raise TimeoutError

            with suppress(TimeoutError, RuntimeError):
                _beside(distributed.destroy_process_group, check)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that runs the loop, writes the run folder and speaks to the user."""
        return self.rank == 0

    def sum(self, values: Iterable[Tensor], check: Callable[[], None] = lambda: None) -> None:
        """Replace each element of each tensor by its sum over all processes, in all of them.

        `check` is called while this process waits. Where it raises, no sums are possible any more.
        """
        if self.size == 1:
            return
        try:
            for work in [distributed.all_reduce(value, async_op=True) for value in values]:
                while not work.is_completed():
                    check()
                    time.sleep(POLL)
                work.wait()
        except BaseException:
            # A sum that never ends would hold the GPU, and whatever waits for it.
            if torch.cuda.is_available() and distributed.is_initialized():
                distributed.distributed_c10d._abort_process_group()
            raise

    def broadcast(self, value: Any) -> Any:
        """What the main process has as `value`, in all of them."""
        values = [value]
        if self.size > 1:
            distributed.broadcast_object_list(values)
        return values[0]


def _number(name: str, least: int) -> int:
    value = os.environ.get(name, str(least))
    if not value.isdecimal() or (name == "WORLD_SIZE" and int(value) < 1):
        raise ConfigError(f"{name}={value} in the environment is no number of processes; {UNSET}")
    return int(value)


def _beside(work: Callable[[], object], check: Callable[[], None]) -> None:
    """Do it in a thread: Python hears no signal while torch waits, and those it waits for may never come."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        check()
    if failed:
        raise failed[0]


PATIENCE = 10.0
"""Seconds to wait for others that may be gone."""
POLL = 1e-4
"""Seconds from one look at a sum to the next."""
VARIABLES = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
"""Of the environment, and what holds without: which process this is, of how many, and which on its machine."""
UNSET = "if no launcher has started this process, unset WORLD_SIZE"
