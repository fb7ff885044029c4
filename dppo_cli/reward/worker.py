"""The process in which a reward function runs: `python -m dppo_cli.reward.worker FD`.

It imports the function, then answers calls over a socket until the other side closes it. What the function prints goes
to standard error. Nothing it does to its process (chdir, sys.exit, threads, patched modules) reaches the trainer.

Requests are pickled by the trainer; answers are JSON, so that nothing the function returns is unpickled there. Both are
preceded by their length. Imports no torch.
"""

import asyncio
import ctypes
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import resource
import signal
import socket
import struct
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dppo_cli.config.checks import did_you_mean
from dppo_cli.errors import RewardError

LENGTH = struct.Struct("!Q")
PR_SET_PDEATHSIG = 1
LOGGED = 1000
"""Most characters of a text that a function logs of a sample."""
PLACED = ("prompts", "completions")


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


class Calls:
    """Calls one function. Its event loop lives as long as the process, so that an async function may keep a client."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, keywords: dict[str, Any], step: int) -> dict[str, Any]:
        """What a call gave: `rewards`, or what was `returned` instead, or `raised`, or why it `died`.

        With `rewards` come the values that were logged of each sample (`extra`) and of the call (`metrics`).
        """
        logged = _Logged(keywords)
        ours = {
            "trainer_state": SimpleNamespace(global_step=step),
            "log_extra": logged.log_extra,
            "log_metric": logged.log_metric,
        }
        try:
            positional, named = arguments(self.function, {**keywords, **ours})
            rewards = self.function(*positional, **named)
            if inspect.isawaitable(rewards):
                self.loop = self.loop or asyncio.new_event_loop()
                rewards = self.loop.run_until_complete(_awaited(rewards))
            found = rewards if isinstance(rewards, list) else _listed(rewards)
        except MemoryError:
            return {"died": "it ran out of reward.memory_gib"}
        except Exception as error:
            return {"raised": told(error)}
        if found is None or len(found) != logged.count:
            return {"returned": type(rewards).__name__ if found is None else f"a list of {len(found)}"}
        metrics = {name: sum(values) / len(values) for name, values in logged.metrics.items()}
        return {"rewards": [_number(reward) for reward in found], "extra": logged.extra, "metrics": metrics}


class _Logged:
    """What a function logs through the callables that TRL passes, too."""

    def __init__(self, keywords: dict[str, Any]) -> None:
        self.count, self.keywords = len(keywords["completions"]), keywords
        self.extra: dict[str, list[str | None]] = {}
        self.metrics: dict[str, list[float]] = {}

    def log_extra(self, column: str, values: Any) -> None:
        """A text for each sample."""
        texts = [None if value is None else str(value)[:LOGGED] for value in values]
        if len(texts) != self.count:
            raise ValueError(f"log_extra({column!r}) got {len(texts)} values for {self.count} samples")
        # A column of the data, logged as it is, says nothing of the sample. (`answer` is the response's.)
        if column == "answer" or list(values) != self.keywords.get(column):
            self.extra[str(column)] = texts

    def log_metric(self, name: str, value: Any) -> None:
        """A number for the call."""
        number = _number(value)
        if not isinstance(number, float):
            raise ValueError(f"log_metric({name!r}) got {value!r}, which is not a finite number")
        self.metrics.setdefault(str(name), []).append(number)


def arguments(function: Any, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments: everything by keyword, as far as the function takes it.

    A function whose first two parameters have names of their own, such as `f(questions, responses, **columns)`, gets
    prompts and completions by position. Raises TypeError if it needs what there is not.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # Written in C.
        return [], given
    kinds = inspect.Parameter
    takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    takes = {p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    positional = [given[name] for name in PLACED] if _takes_by_position(parameters, given) else []
    rest = {name: value for name, value in given.items() if not (positional and name in PLACED)}
    named = {name: value for name, value in rest.items() if takes_all or name in takes}
    needed = [p.name for p in parameters[len(positional) :] if p.default is kinds.empty and p.name in takes]
    if lacking := [name for name in needed if name not in named]:
        raise TypeError(f"it needs {', '.join(lacking)}, and there are {', '.join(given)}")
    return positional, named


def _takes_by_position(parameters: list[inspect.Parameter], given: dict[str, Any]) -> bool:
    """Whether the first two parameters are for prompts and completions, but have other names, or no name to use."""
    kinds = inspect.Parameter
    if not all(name in given for name in PLACED) or not parameters:
        return False
    if parameters[0].kind is kinds.VAR_POSITIONAL:
        return all(p.kind is not kinds.VAR_KEYWORD for p in parameters)
    first = parameters[:2]
    own = [
        p.kind is kinds.POSITIONAL_ONLY or (p.kind is kinds.POSITIONAL_OR_KEYWORD and p.name not in given)
        for p in first
    ]
    ours = [p.name == name for p, name in zip(first, PLACED, strict=False)]
    needed = all(p.default is kinds.empty for p in first)
    return len(first) == 2 and needed and any(own) and all(a or b for a, b in zip(own, ours, strict=True))


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def _listed(rewards: Any) -> list[Any] | None:
    """A tuple, an array, a tensor or a generator as a list; None for what is no list of numbers."""
    if isinstance(rewards, str | bytes | dict | set):
        return None
    try:
        items = iter(rewards)
    except TypeError:
        return None
    return list(items)


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


def told(error: Exception) -> str:
    """An exception in a line, with where the user's file last was: `KeyError: 'x' (mine.py, line 3, in score)`."""
    between = ("<frozen ", os.path.dirname(asyncio.__file__))
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith(between)
    ]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
    return f"{type(error).__name__}: {error}{at}"


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
        raise RewardError(f"reward.path={where} cannot be imported: {told(error)}") from error


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
        limit = min(int(memory_gib * 2**30), 2**62)
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
        calls = Calls(function)
        while True:
            answer = calls(*pickle.loads(receive(connection)))
            if os.getpid() != process:
                os._exit(0)  # A fork that the function made and let return: its answer would be a second one.
            send(connection, json.dumps(answer).encode())
    except (EOFError, ConnectionError):
        pass


if __name__ == "__main__":
    main()
