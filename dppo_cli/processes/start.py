"""From one process to a crew: workers that are started here, or those that a launcher has started with this process."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

import torch

from dppo_cli.errors import ConfigError, RunError
from dppo_cli.processes import worker
from dppo_cli.processes.crew import ENDING, Crew
from dppo_cli.processes.line import Line
from dppo_cli.world import World

PATIENCE = 10.0
"""Seconds that workers have to end after their lines were closed, before they are killed."""
A_CORE = 4
"""Processes on a core. More than one is slower, and good for a try."""
CONNECTING = 60.0
"""Seconds that the processes of a launcher have to reach the main one, once all of them are there."""


def crew_of(
    world: World, processes: int, device: str, work: str, warn: Callable[[str], None]
) -> AbstractContextManager[Crew]:
    """The crew of the main process: `world`, if a launcher has started one; else `processes` on this machine.

    `device`: cuda, cpu or mps. `work`: MODULE:FUNCTION of the life of a worker that is started here; it is called with
    its line and world. Raises ConfigError for more processes than GPUs, or than four for each core.
    """
    size = world.size if world.size > 1 else processes
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


def launched_worker(world: World) -> Line | None:
    """The line of a worker that a launcher has started; None if the main process has ended, and so has said why.

    Raises RunError if the main process cannot be reached.
    """
    try:
        address, key = world.broadcast(None)
    except RuntimeError:
        return None
    try:
        line = Line(Client(address, authkey=key))
    except (OSError, EOFError, AuthenticationError) as error:
        host, port = address
        raise RunError(f"the main process cannot be reached at {host}, port {port}: {error}") from None
    line.send(world.rank)
    return line


@contextmanager
def _launched(world: World, warn: Callable[[str], None]) -> Iterator[Crew]:
    with ExitStack() as undo:
        lines = _connected(world)
        for line in lines:
            undo.callback(line.close)
        yield Crew(world, lines, warn, lambda number: "its launcher says how")


def _connected(world: World) -> list[Line]:
    """The lines of all workers, in the order of their ranks."""
    local = os.environ.get("LOCAL_WORLD_SIZE") == str(world.size)
    host = "127.0.0.1" if local else os.environ.get("MASTER_ADDR", "127.0.0.1")
    key = secrets.token_bytes(32)
    found: dict[int, Line] = {}
    workers = range(1, world.size)
    with Listener(("127.0.0.1" if local else "", 0), backlog=world.size, authkey=key) as listener:

        def accept() -> None:
            while len(found) < len(workers):
                # Whoever does not know the key is left out.
                with suppress(EOFError, OSError, AuthenticationError):
                    line = Line(listener.accept())
                    found[line.receive()] = line

        try:
            world.broadcast(((host, listener.address[1]), key))
        except RuntimeError as error:
            raise _apart(world.size, error) from None
        threading.Thread(target=accept, daemon=True).start()
        ends = time.monotonic() + CONNECTING
        while len(found) < len(workers):
            if time.monotonic() > ends:
                missing = ", ".join(str(rank + 1) for rank in workers if rank not in found)
                raise RunError(
                    f"no connection from process {missing} of {world.size} within {CONNECTING:g} seconds; processes "
                    f"must reach {host} at any port"
                )
            time.sleep(0.02)
    return [found[rank] for rank in workers]


@contextmanager
def _started(size: int, device: str, work: str, warn: Callable[[str], None]) -> Iterator[Crew]:
    started: list[subprocess.Popen[bytes]] = []
    lines: list[Line] = []
    threads = torch.get_num_threads()
    share = max(1, threads // size)
    # What the user's modules are found by.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}

    def how_ended(number: int) -> str:
        with suppress(subprocess.TimeoutExpired, ValueError):
            status = started[number].wait(ENDING)
            if status < 0:
                return signal.Signals(-status).name
        return "what it wrote last says why"

    with ExitStack() as undo:
        world = World(0, size)
        undo.callback(world.leave)  # once the others are gone
        undo.callback(_end, started)
        if device == "cpu":
            environment["OMP_NUM_THREADS"] = str(share)
            undo.callback(torch.set_num_threads, threads)
            torch.set_num_threads(share)
        for rank in range(1, size):
            ours, theirs = socket.socketpair()
            lines.append(Line(Connection(ours.detach())))
            undo.callback(lines[-1].close)
            # -P: nothing from the working folder, where a file may be called like a library.
            command = [sys.executable, "-P", "-m", worker.__name__, work, str(theirs.fileno()), str(rank), str(size)]
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
        crew = Crew(world, lines, warn, how_ended)
        store = worker.store(0, size)
        crew.begin_all("join", device, store.port)
        try:
            world.joined(device, 0, store, crew.check)
        except RuntimeError as error:
            with suppress(RuntimeError):
                crew.check(ENDING)  # One that has ended says more.
            raise _apart(size, error) from None
        crew.ended()
        yield crew


def _apart(size: int, error: RuntimeError) -> RunError:
    return RunError(f"the {size} processes cannot reach each other: {str(error).splitlines()[0]}")


def _end(started: list["subprocess.Popen[bytes]"]) -> None:
    """Wait for those whose lines are closed, and kill what does not end."""
    ends = time.monotonic() + PATIENCE
    for process in started:
        try:
            process.wait(max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
