"""A worker that the main process has started: `python -m dppo_cli.processes.worker MODULE:FUNCTION DESCRIPTOR`.

It meets the others, and calls the function with its line and its world.
"""

import importlib
import logging
import os
import sys
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from dppo_cli.processes.line import Line
from dppo_cli.world import World


def store(port: int, size: int) -> Any:
    """By which processes on this machine find each other; port 0: the main process's, at a port that is free."""
    distributed: Any = torch.distributed
    return distributed.TCPStore("127.0.0.1", port, size, is_master=port == 0, wait_for_workers=False)


def main(work: str, descriptor: str) -> None:
    # Hydra does so in the main process: libraries log at their import what concerns nobody.
    logging.getLogger().addHandler(logging.NullHandler())
    module, _, function = work.partition(":")
    live = getattr(importlib.import_module(module), function)
    line = Line(Connection(int(descriptor)))
    with suppress(EOFError, OSError):  # The main process has ended.
        line.send("here")
        rank, size, device, port = line.receive()
        live(line, World(rank, size).joined(device, rank, store(port, size)))
    sys.stdout.flush()
    # Without leaving its world, which may wait for a process that is gone.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
