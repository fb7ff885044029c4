"""The process in which a function of the user runs: `python -m dppo_cli.calls.worker FD`.

It imports the function, then answers calls over a socket until the other side closes it. What the function prints goes
to standard error. Nothing it does to its process (chdir, sys.exit, threads, patched modules) reaches the trainer.

Requests are pickled by the trainer; answers are JSON, so that nothing the function returns is unpickled there. Both are
preceded by their length. Imports no torch.
"""

import ctypes
import importlib
import importlib.util
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from dppo_cli.calls.caller import told
from dppo_cli.calls.replies import Replies
from dppo_cli.calls.scores import Scores
from dppo_cli.calls.tools import Tools
from dppo_cli.config.checks import did_you_mean
from dppo_cli.errors import DppoError

LENGTH = struct.Struct("!Q")
PR_SET_PDEATHSIG = 1


class Answers(Protocol):
    """What becomes of a request. `about`: what the trainer has to know of the function, as JSON."""

    about: dict[str, Any]

    def __call__(self, keywords: dict[str, Any], number: int) -> dict[str, Any]:
        """As JSON. `number`: what else there is to say. Raises MemoryError."""
        ...


ANSWERS: dict[str, Callable[[Any], Answers]] = {"scores": Scores, "reply": Replies, "tools": Tools}


class FindError(Exception):
    """Its text names the key, and says in a line why there is no function."""


def send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(LENGTH.pack(len(message)) + message)


def receive(connection: socket.socket) -> bytes:
    """A whole message. Raises EOFError if the other side is gone."""
    (length,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
    return _exactly(connection, length)


def find_function(key: str, path: str) -> Any:
    """The function that `file.py:function` or `package.module:function` names. Raises FindError.

    `key`: of the config, such as `reward.path`.
    """
    where, _, name = path.rpartition(":")
    module = _import(key, where)
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise FindError(f"{key}={path}: there is no function {name!r}{did_you_mean(name, names)}")
    return function


def _import(key: str, where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where)
        if not path.is_file():
            raise FindError(f"{key}: there is no file {where} (in {Path.cwd()})")
        # A prefixed name, so that a file called random.py does not replace the module `random`.
        spec = importlib.util.spec_from_file_location(f"dppo_user_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        return module
    except FindError:
        raise
    except DppoError as error:  # One of our own that needs what there is not.
        raise FindError(str(error)) from error
    except Exception as error:
        raise FindError(f"{key}={where} cannot be imported: {told(error)}") from error


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = connection.recv(min(count, 2**20))
        if not part:
            raise EOFError
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if sys.platform == "linux":
        # A worker that hangs does not outlive a trainer that was killed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        kind, section, paths, sys.path[:], memory_gib = pickle.loads(receive(connection))
        limit = min(int(memory_gib * 2**30), 2**62)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            functions = [find_function(f"{section}.path", path) for path in paths]
            answers = ANSWERS[kind](functions if kind == "tools" else functions[0])
        except (FindError, DppoError) as error:
            send(connection, json.dumps({"error": str(error)}).encode())
            return
        send(connection, json.dumps(answers.about).encode())
        process = os.getpid()
        while True:
            request = pickle.loads(receive(connection))
            try:
                answer = answers(*request)
            except MemoryError:
                answer = {"died": f"it ran out of {section}.memory_gib"}
            if os.getpid() != process:
                os._exit(0)  # A fork that the function made and let return: its answer would be a second one.
            send(connection, json.dumps(answer).encode())
    except (EOFError, ConnectionError):
        pass


if __name__ == "__main__":
    main()
