"""A worker that the main process has started.

`python -m dppo_cli.processes.worker MODULE:FUNCTION DESCRIPTOR RANK SIZE` calls the function with a line and a world,
which it has to join when it is asked to.
"""

import logging
import os
import signal
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch

from dppo_cli.processes.lasting import load
from dppo_cli.processes.line import Line
from dppo_cli.world import World


def store(port: int, size: int) -> Any:
    """By which processes on this machine find each other; port 0: the main process's, at a port that is free."""
    distributed: Any = torch.distributed
    return distributed.TCPStore("127.0.0.1", port, size, is_master=port == 0, wait_for_workers=False)


def join(world: World, device: str, port: int) -> None:
    """Meet the others, at the port of the main process's store."""
    world.joined(device, world.rank, store(port, world.size))


def hear_no_signals() -> None:
    """The main process hears them. It ends a step, saves, and closes the line."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def main(work: str, descriptor: str, rank: str, size: str) -> None:
    hear_no_signals()
    # Hydra does so in the main process: libraries log at their import what concerns nobody.
    logging.getLogger().addHandler(logging.NullHandler())
    module, _, function = work.partition(":")
    live = getattr(load(module), function)
    live(Line(Connection(int(descriptor))), World(int(rank), int(size)))
    sys.stdout.flush()
    # Without leaving its world, which may wait for a process that is gone.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
