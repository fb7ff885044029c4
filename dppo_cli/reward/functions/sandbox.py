"""Runs a piece of a program that nobody has read, by the means of the Linux kernel. Imports no torch.

    caller ── fork ── outside: mounts, user, namespaces ── fork ── init: process 1 inside ── fork ── inside: the job

Namespaces: mounts, processes, network, IPC, host name, user. The job sees the folders in `seen`, read-only, a few
devices, and /program, a folder in memory that is its own and is gone afterwards. It is a user without any capability,
cannot become another one, and cannot make namespaces of its own: it is in a chroot, which forbids user namespaces. It
has limits on time, memory, processes, files and output. Protects neither from faults of the kernel nor from other uses
of the processor.
"""

import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dppo_cli.reward.functions.namespaces import HOME, LIBRARIES, PYTHON, start
from dppo_cli.reward.functions.namespaces import Limits as Limits

POLL = 0.05
"""Seconds between two looks at the memory of the job."""
START_IN = 30.0
"""Seconds in which the sandbox must be ready; they do not count for the job."""
GONE_IN = 5.0
"""Seconds after which processes that were killed are no longer waited for."""
ERRORS_KEPT = 4096
LEAST_LEFT = 0.02
"""Share of the machine's memory below which a job is stopped: files in shared memory are not counted as its own."""
SHORT_OF_MEMORY = "the machine ran short of memory"


@dataclass(frozen=True)
class Outcome:
    """What a job has written, and its exit status, negative for a signal; or why it was stopped."""

    output: bytes
    errors: bytes
    status: int
    stopped: str = ""


class SandboxError(Exception):
    """The kernel does not allow what is needed. The text says what."""


def run(job: Callable[[], None], limits: Limits, seen: Sequence[str] = (), stdin: bytes = b"") -> Outcome:
    """Call `job` inside. It may replace its process (exec), or return. Raises SandboxError."""
    given = _sealed(stdin)
    (out, out_w), (err, err_w), (said, said_w), (forked, forked_w) = os.pipe(), os.pipe(), os.pipe(), os.pipe()
    outside = os.fork()
    if outside == 0:
        start(job, limits, [*python_folders(), *seen], (given, out_w, err_w, said_w, forked_w))
    for fd in (given, out_w, err_w, said_w, forked_w):
        os.close(fd)
    try:
        return _watched(limits, out, err, said, forked)
    finally:
        for fd in (out, err, said, forked):
            os.close(fd)
        _reap(outside)


def python(*arguments: str) -> NoReturn:
    """For a job: become this Python, without its packages. Nothing is in its environment but where it is."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": HOME, "LANG": "C.UTF-8"}
    os.execve(PYTHON, [PYTHON, "-I", "-S", "-B", *arguments], environment)


def check() -> None:
    """Raise SandboxError, with the reason, unless Python starts inside."""
    if sys.platform != "linux":
        raise SandboxError(f"this is {sys.platform}")
    outcome = run(lambda: python("-c", "print(6 * 7)"), Limits(60.0, 2**30, 8, 2**20, 1000))
    if outcome.output != b"42\n":
        raise SandboxError(
            f"Python does not start in one: {outcome.stopped or outcome.errors.decode(errors='replace')}"
        )


def python_folders() -> list[str]:
    """What this Python needs to start: its program and its libraries, and those of the system."""
    return [*LIBRARIES, PYTHON, f"{sys.base_prefix}/lib"]


# In the caller


def _watched(limits: Limits, out: int, err: int, said: int, forked: int) -> Outcome:
    """Read until the job ends, or breaks a limit and is killed. `forked` ends when the job has started a program."""
    parts = {out: bytearray(), err: bytearray(), said: bytearray()}
    init = _started(said, parts[said])
    stopped, is_open, start = "", set(parts), time.monotonic()
    end, next_look = start + limits.seconds, start + POLL
    # Until the job starts a program it shares the caller's pages, as process 1 does: none of them is its own. With how
    # many others changes while they start, so all of each page (Rss) is allowed, not its share (Pss).
    inherited = _own_memory_of(init, "Rss")
    while said in is_open and not stopped:
        for fd in select.select(list(is_open), [], [], POLL)[0]:
            if not (part := os.read(fd, 2**16)):
                is_open.discard(fd)
            parts[fd] += part
            if fd != said and len(parts[fd]) > limits.output:
                stopped = "it printed too much"
        if (now := time.monotonic()) >= end:
            stopped = f"it took longer than {limits.seconds:g} seconds"
        elif now >= next_look:
            next_look = now + POLL
            allowed = limits.memory + (0 if select.select([forked], [], [], 0)[0] else inherited)
            if _memory_of(init) > allowed:
                stopped = "it used too much memory"
            elif _memory_left() < LEAST_LEFT:
                stopped = SHORT_OF_MEMORY
    messages = _messages(parts[said])
    if found := [message["error"] for message in messages if "error" in message]:
        raise SandboxError(found[0])
    status = next((message["status"] for message in messages if "status" in message), None)
    if status is None:
        # Process 1 takes all others along. It was not waited for yet, so the number is still its own.
        with suppress(ProcessLookupError):
            os.kill(init, signal.SIGKILL)
        return Outcome(bytes(parts[out]), bytes(parts[err][:ERRORS_KEPT]), -signal.SIGKILL, stopped or "it was killed")
    for fd in is_open - {said}:  # What was written last.
        while len(parts[fd]) <= limits.output and (part := os.read(fd, 2**16)):
            parts[fd] += part
    return Outcome(bytes(parts[out]), bytes(parts[err][-ERRORS_KEPT:]), status)


def _started(said: int, read: bytearray) -> int:
    """Wait for process 1 of the job, and give its number outside."""
    end = time.monotonic() + START_IN
    while time.monotonic() < end:
        if select.select([said], [], [], POLL)[0]:
            part = os.read(said, 2**16)
            read += part
            for message in _messages(read):
                if "error" in message:
                    raise SandboxError(message["error"])
                if "init" in message:
                    return int(message["init"])
            if not part:
                break
    raise SandboxError(f"no process was started in it within {START_IN:g} seconds")


def _reap(outside: int) -> None:
    """Wait until all is gone: the outer process waits for process 1, and that ends after all others."""
    end = time.monotonic() + GONE_IN
    while os.waitpid(outside, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.kill(outside, signal.SIGKILL)
            os.waitpid(outside, 0)
            return
        time.sleep(0.001)


def _messages(said: bytes | bytearray) -> list[dict[str, Any]]:
    return [json.loads(line) for line in said.splitlines(keepends=True) if line.endswith(b"\n")]


def _memory_of(pid: int) -> int:
    """Bytes of memory of what a process has started; a page that two of them share counts half for each."""
    total = 0
    with suppress(OSError, ValueError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            total += _memory_of(int(child)) + _own_memory_of(int(child))
    return total


def _own_memory_of(pid: int, kind: str = "Pss") -> int:
    """Of one process; 0 if it is gone."""
    with suppress(OSError, ValueError, IndexError):
        sizes = Path(f"/proc/{pid}/smaps_rollup").read_text().split(f"{kind}:", 1)[1]
        return int(sizes.split()[0]) * 1024
    return 0


def _memory_left() -> float:
    """The share of the machine's memory that can be had."""
    sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(sizes["MemAvailable"].split()[0]) / int(sizes["MemTotal"].split()[0])


def _sealed(content: bytes) -> int:
    """A file in memory that nobody can change or enlarge."""
    fd = os.memfd_create("stdin", os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
