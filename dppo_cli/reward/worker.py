"""The process in which a user's reward function runs: `python -m dppo_cli.reward.worker FD`.

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
from pathlib import Path
from typing import Any

from dppo_cli.config.checks import did_you_mean
from dppo_cli.errors import RewardError

LENGTH = struct.Struct("!Q")
PR_SET_PDEATHSIG = 1


def send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(LENGTH.pack(len(message)) + message)


def receive(connection: socket.socket) -> bytes:
    """A whole message. Raises EOFError if the other side is gone."""
    (length,) = LENGTH.unpack(_exactly(connection, LENGTH.size))
    return _exactly(connection, length)


def find_function(path: str) -> Any:
    """The function that `file.py:function` or `package.module:function` names. Raises RewardError, in a line."""
    where, _, name = path.rpartition(":")
    module = _import(where)
    function = getattr(module, name, None)
    if not callable(function):
        names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise RewardError(f"reward.path={path}: there is no function {name!r}{did_you_mean(name, names)}")
    return function


def call(function: Any, request: tuple[list[str], list[str], dict[str, list[Any]]]) -> dict[str, Any]:
    """What a call gave: `rewards`, or what was `returned` instead of a list, or what was `raised`, or why it `died`."""
    prompts, completions, columns = request
    try:
        rewards = function(prompts, completions, **columns)
    except MemoryError:
        return {"died": "it ran out of reward.memory_gib"}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}
    if not isinstance(rewards, list) or len(rewards) != len(completions):
        return {"returned": f"a list of {len(rewards)}" if isinstance(rewards, list) else type(rewards).__name__}
    return {"rewards": [_number(reward) for reward in rewards]}


def _number(reward: Any) -> float | dict[str, str] | None:
    """A number, None, or the text of something else."""
    if reward is None:
        return None
    try:
        number = float(reward)
        if number - number == 0:  # neither NaN nor infinite
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    return {"wrong": repr(reward)[:200]}


def _import(where: str) -> Any:
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        path = Path(where)
        if not path.is_file():
            raise RewardError(f"reward.path: there is no file {where} (in {Path.cwd()})")
        # A prefixed name, so that a file called random.py does not replace the module `random`.
        spec = importlib.util.spec_from_file_location(f"dppo_reward_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        return module
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"reward.path={where} cannot be imported: {type(error).__name__}: {error}") from error


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
        path, sys.path[:], memory_gib = pickle.loads(receive(connection))
        limit = int(memory_gib * 2**30)
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        try:
            function = find_function(path)
            found: dict[str, Any] = {"whole_groups": bool(getattr(function, "whole_groups", False))}
        except RewardError as error:
            send(connection, json.dumps({"error": str(error)}).encode())
            return
        send(connection, json.dumps(found).encode())
        process = os.getpid()
        while True:
            answer = call(function, pickle.loads(receive(connection)))
            if os.getpid() != process:
                os._exit(0)  # A fork that the function made and let return: its answer would be a second one.
            send(connection, json.dumps(answer).encode())
    except (EOFError, ConnectionError):
        pass


if __name__ == "__main__":
    main()
