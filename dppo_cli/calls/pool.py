"""A small pool of warm processes that call functions of the user, and can be killed."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Event
from typing import Any

from dppo_cli.calls.worker import receive, send
from dppo_cli.errors import DppoError, RewardError

LOADING = 120.0
"""Seconds that importing the function's module may take."""

Call = tuple[dict[str, Any], int]
"""The keywords that the function gets, and a number that goes with them; see `dppo_cli.calls.worker.Answers`."""


@dataclass(frozen=True)
class Kind:
    """What a pool's functions are for.

    `answers`: the key of `dppo_cli.calls.worker.ANSWERS`. `section`: of the config, for messages. `error`: raised where
    there is no such function.
    """

    answers: str
    section: str
    error: type[DppoError]


REWARD = Kind("scores", "reward", RewardError)


class CallError(Exception):
    """A call that had to be killed, or killed its process. The text says how."""


class Worker:
    """One process. Killed, with all its children, when it is closed or forgotten."""

    def __init__(self, kind: Kind, paths: Sequence[str], memory_gib: float) -> None:
        """A process that has imported nothing yet."""
        self.asked = kind, paths, memory_gib
        self.connection, theirs = socket.socketpair()
        # -P: nothing from the working folder, where a file may be called like a library. -u: prints are seen at once.
        command = [sys.executable, "-P", "-u", "-m", "dppo_cli.calls.worker", str(theirs.fileno())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
        )
        theirs.close()
        self.close = weakref.finalize(self, _kill, self.process, self.connection)
        self.about: dict[str, Any] = {}

    def load(self) -> "Worker":
        """Have the functions imported. Raises the kind's error if one cannot be."""
        kind, paths, memory_gib = self.asked
        try:
            what = (kind.answers, kind.section, list(paths), [os.getcwd(), *sys.path], memory_gib)
            self.about = self._ask(pickle.dumps(what), LOADING)
        except CallError as error:
            raise kind.error(f"{kind.section}.path={', '.join(paths)} cannot be imported: {error}") from None
        if "error" in self.about:
            self.close()
            raise kind.error(self.about["error"])
        return self

    def call(self, call: Call, timeout: float) -> dict[str, Any]:
        """What the call gave; see `dppo_cli.calls.worker.Answers`. Raises CallError, with the process gone."""
        answer = self._ask(pickle.dumps(call), timeout)
        if "died" in answer:
            self.close()
            raise CallError(answer["died"])
        return answer

    def _ask(self, request: bytes, timeout: float) -> dict[str, Any]:
        try:
            self.connection.settimeout(timeout)
            send(self.connection, request)
            answer: dict[str, Any] = json.loads(receive(self.connection))
        except TimeoutError:
            self.close()
            raise CallError(f"it did not answer within {timeout:g} seconds") from None
        except (EOFError, ConnectionError):
            try:
                status = self.process.wait(timeout)
                how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
                raise CallError(f"its process ended ({how})") from None
            except subprocess.TimeoutExpired:
                raise CallError("it closed its connection") from None
            finally:
                self.close()
        return answer


class Pool:
    """`count` workers of the same functions. A worker that was killed is replaced when it is needed.

    `stateless`: the functions keep no state from call to call, so there is no worker that takes those of `call` alone.
    `about`: what a worker says of its functions when it has imported them.
    """

    def __init__(
        self,
        paths: str | Sequence[str],
        count: int,
        timeout: float,
        memory_gib: float,
        stateless: bool = False,
        kind: Kind = REWARD,
    ) -> None:
        self.paths = [paths] if isinstance(paths, str) else list(paths)
        self.timeout, self.memory_gib, self.kind = timeout, memory_gib, kind
        first = self._worker().load()
        self.about = first.about
        # The first one takes all calls as long as none fails, so that a function may keep a state.
        self.first: Worker | None = None if stateless else first
        self.others: list[Worker | None] = [first if stateless else None, *[None] * (count - 1)]
        self.free: SimpleQueue[int] = SimpleQueue()
        for number in range(count):
            self.free.put(number)
        self.count = count
        self.threads = ThreadPoolExecutor(count)
        self.begun: list[Future[dict[str, Any] | CallError]] = []
        self.ended = Event()

    def call(self, call: Call) -> dict[str, Any]:
        """One call, by the first worker. Raises CallError."""
        self.first = self.first or self._worker().load()
        try:
            return self.first.call(call, self.timeout)
        except CallError:
            self.first = None
            raise

    def begin(self, call: Call) -> "Future[dict[str, Any] | CallError]":
        """A call beside others, as soon as a worker is free; what it gave, or how it failed."""
        self.begun = [earlier for earlier in self.begun if not earlier.done()]
        self.begun.append(self.threads.submit(self._call, call, self.ended))
        return self.begun[-1]

    def give_up(self) -> None:
        """Kill the workers of calls that were begun: the interpreter waits for its threads, and they for them."""
        for call in self.begun:
            call.cancel()
        self.ended.set()
        self.begun, self.ended = [], Event()
        for number, worker in enumerate(self.others):
            if worker is not None:
                worker.close()
                self.others[number] = None

    def _worker(self) -> Worker:
        return Worker(self.kind, self.paths, self.memory_gib)

    def _call(self, call: Call, ended: Event) -> dict[str, Any] | CallError:
        number = self.free.get()
        try:
            worker = self.others[number]
            if worker is None:
                # Known before it imports anything, so that `give_up` finds it.
                worker = self.others[number] = self._worker()
                if not ended.is_set():
                    worker.load()
            if ended.is_set():
                raise CallError("it was not called any more")
            return worker.call(call, self.timeout)
        except CallError as error:
            self.others[number] = None
            return error
        except BaseException:
            self.others[number] = None  # It could not import its functions, and is closed.
            raise
        finally:
            self.free.put(number)


def _kill(process: "subprocess.Popen[bytes]", connection: socket.socket) -> None:
    """The process and what it has started."""
    connection.close()
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # Reaped, so that no zombie is left.
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
