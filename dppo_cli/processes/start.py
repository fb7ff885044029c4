"""From one process to a crew: workers that are started here, or those that a launcher has started with this process."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from multiprocessing.connection import Client, Connection, Listener

import torch

from dppo_cli.errors import ConfigError, RunError
from dppo_cli.processes import worker
from dppo_cli.processes.crew import Crew
from dppo_cli.processes.line import Line
from dppo_cli.world import World

PATIENCE = 10.0
"""Seconds that a worker has to end after its line was closed, before it is killed."""
A_CORE = 4
"""Processes on a core. More than one is slower, and good for a try."""
ENDING = 2.0
"""Seconds from the end of a process's lines to that of the process itself."""


def crew_of(
    world: World, processes: int, device: str, work: str, warn: Callable[[str], None]
) -> AbstractContextManager[Crew]:
    """The crew of the main process: `world`, if a launcher has started one; else `processes` on this machine.

    `device`: its kind. `work`: MODULE:FUNCTION of the life of a worker that is started here; it is called with its line
    and world. Raises ConfigError for more processes than GPUs, and for two numbers of processes.
    """
    size = max(world.size, processes)
    if world.size > 1 and processes not in (1, world.size):
        raise ConfigError(
            f"hardware.processes={processes}, but the launcher has started {world.size}; leave one of them out"
        )
    if size > 1 and device not in ("cuda", "cpu"):
        raise ConfigError(f"hardware.device={device} is one GPU, and each of {size} processes needs one")
    if world.size > 1:
        return _launched(world, warn)
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if device == "cuda" and size > gpus:
        raise ConfigError(f"hardware.processes={size}, and torch sees {gpus} GPUs here: each process needs one")
    if device == "cpu" and size > A_CORE * cores:
        raise ConfigError(f"hardware.processes={size} is more than {A_CORE} for each of the {cores} cores here")
    return nullcontext(Crew(world, [], warn)) if size == 1 else _started(size, device, work, warn)


def launched_worker(world: World) -> Line:
    """The line of a worker that a launcher has started."""
    address, key = world.told(None)
    return Line(Client(address, authkey=key))


@contextmanager
def _launched(world: World, warn: Callable[[str], None]) -> Iterator[Crew]:
    local = os.environ.get("LOCAL_WORLD_SIZE") == str(world.size)
    host = "127.0.0.1" if local else os.environ.get("MASTER_ADDR", "127.0.0.1")
    key = secrets.token_bytes(32)
    with ExitStack() as undo:
        with Listener(("127.0.0.1" if local else "", 0), backlog=world.size, authkey=key) as listener:
            world.told(((host, listener.address[1]), key))
            lines = [Line(listener.accept()) for _ in range(1, world.size)]
        for line in lines:
            undo.callback(line.close)
        yield Crew(world, lines, warn)


@contextmanager
def _started(size: int, device: str, work: str, warn: Callable[[str], None]) -> Iterator[Crew]:
    started: list[subprocess.Popen[bytes]] = []
    lines: list[Line] = []
    threads = torch.get_num_threads()
    share = max(1, threads // size)
    # What the user's modules are found by.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}

    def how_ended(number: int) -> str:
        with suppress(subprocess.TimeoutExpired):
            status = started[number].wait(ENDING)
            if status < 0:
                return signal.Signals(-status).name
        return "what it wrote last says why"

    with ExitStack() as undo:
        undo.callback(_end, started)
        if device == "cpu":
            environment["OMP_NUM_THREADS"] = str(share)
            undo.callback(torch.set_num_threads, threads)
            torch.set_num_threads(share)
        for _ in range(1, size):
            ours, theirs = socket.socketpair()
            lines.append(Line(Connection(ours.detach())))
            undo.callback(lines[-1].close)
            # -P: nothing from the working folder, where a file may be called like a library.
            command = [sys.executable, "-P", "-m", worker.__name__, work, str(theirs.fileno())]
            # In a session of its own: Ctrl-C is for the main process, and a worker whose line is closed ends by itself.
            started.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,
                )
            )
            theirs.close()
        for number, line in enumerate(lines):
            try:
                line.receive()
            except (EOFError, OSError):
                raise RunError(f"process {number + 2} of {size} could not be started: {how_ended(number)}") from None
        store = worker.store(0, size)
        for rank, line in enumerate(lines, 1):
            line.send((rank, size, device, store.port))
        world = World(0, size).joined(device, 0, store)
        undo.callback(world.leave)
        yield Crew(world, lines, warn, how_ended)


def _end(started: list["subprocess.Popen[bytes]"]) -> None:
    """Wait for those whose lines are closed, and kill what does not end."""
    for process in started:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
