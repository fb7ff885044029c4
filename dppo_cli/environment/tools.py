"""Tools: Python functions of the user that the model calls, which run in processes of their own.

The chat template shows the model their schemas. A call is JSON between `<tool_call>` and `</tool_call>`, anywhere in a
turn (Qwen, SmolLM3, Hermes), or a turn that is nothing but JSON (Llama 3, Mistral):
`{"name": "multiply", "arguments": {"a": 6, "b": 7}}`, with `parameters` for `arguments` in Llama's case.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dppo_cli.calls.pool import CallError, Kind, Pool
from dppo_cli.config.build import CodePaths
from dppo_cli.config.checks import check_rules
from dppo_cli.environment.environment import Reply
from dppo_cli.environment.function import rules_of_turns
from dppo_cli.errors import ReplyError
from dppo_cli.types import Messages, Prompt

KIND = Kind("tools", "environment", ReplyError)
TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|$)", re.DOTALL)


@dataclass(frozen=True)
class Tools:
    """See conf/environment/tools.yaml for the fields."""

    path: CodePaths
    turns: int
    turn_tokens: int | None
    reply_characters: int
    timeout: float
    workers: int
    memory_gib: float

    def __post_init__(self) -> None:
        rules = {
            "path is file.py:function, or a list of them": all(isinstance(path, str) for path in self.paths),
            "path names a function": bool(self.paths),
            **rules_of_turns(self),
        }
        check_rules("environment", self, rules)

    @property
    def paths(self) -> list[str]:
        return list(self.path) if isinstance(self.path, list | tuple) else [self.path]

    def load(self, warn: Callable[[str], None]) -> "ToolEnvironment":
        for path in self.paths:
            where, _, name = path.rpartition(":")
            if not where or not name:
                raise ReplyError(f"environment.path: {path} names no function; write file.py:function")
        pool = Pool(self.paths, self.workers, self.timeout, self.memory_gib, stateless=True, kind=KIND)
        return ToolEnvironment(self, pool)


class ToolEnvironment:
    """See `Environment`. Whatever goes wrong in a call is told to the model, which may call again."""

    role = "tool"
    stop: Sequence[str] = ()

    def __init__(self, option: Tools, pool: Pool) -> None:
        self.option, self.pool = option, pool
        self.turns, self.turn_tokens = option.turns, option.turn_tokens
        self.schemas: Sequence[Mapping[str, Any]] = pool.about["schemas"]

    def begin(self, prompt: Prompt, said: Messages, turn: int) -> Callable[[], Reply]:
        calls = [self._begun(call) for call in calls_in(said[-1]["content"])]
        return lambda: Reply([{"role": self.role, "content": self._result(call)} for call in calls])

    def give_up(self) -> None:
        self.pool.give_up()

    def _begun(self, call: "ToolCall | str") -> "Future[dict[str, Any] | CallError] | str":
        if isinstance(call, str):
            return call
        request = {"name": call.name, "arguments": dict(call.arguments)}
        return self.pool.begin((request, self.option.reply_characters))

    def _result(self, begun: "Future[dict[str, Any] | CallError] | str") -> str:
        if isinstance(begun, str):
            return begun
        answer = begun.result()
        return f"Error: {answer}" if isinstance(answer, CallError) else str(answer["reply"])


@dataclass(frozen=True)
class ToolCall:
    """Example: `ToolCall("multiply", {"a": 6, "b": 7})`."""

    name: str
    arguments: Mapping[str, Any]


def calls_in(text: str) -> list[ToolCall | str]:
    """The calls of a turn, in their order; in the place of one that cannot be read, what to tell the model.

    Example:
        >>> calls_in('<tool_call>{"name": "now", "arguments": {}}</tool_call>')
        [ToolCall(name='now', arguments={})]
        >>> calls_in("It is noon.")
        []
    """
    if tagged := TAGGED.findall(text):
        return [_read(found) for found in tagged]
    bare = text.strip()
    try:
        found = json.loads(bare) if bare[:1] in ("{", "[") else None
    except (ValueError, RecursionError):
        return []
    calls = [_call(one) for one in (found if isinstance(found, list) else [found]) if _has_arguments(one)]
    # A list or an object of another kind is an answer.
    whole = len(calls) == (len(found) if isinstance(found, list) else 1)
    return list(calls) if whole and all(isinstance(call, ToolCall) for call in calls) else []


def _read(text: str) -> ToolCall | str:
    try:
        return _call(json.loads(text.strip()))
    except (ValueError, RecursionError) as error:
        return f"Error: the call is not JSON: {error}"


def _has_arguments(found: Any) -> bool:
    return isinstance(found, dict) and ("arguments" in found or "parameters" in found)


def _call(found: Any) -> ToolCall | str:
    if isinstance(found, dict) and isinstance(found.get("name"), str):
        arguments = found.get("arguments", found.get("parameters")) or {}
        if isinstance(arguments, str):  # JSON in JSON, as in OpenAI's form.
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if isinstance(arguments, dict):
            return ToolCall(found["name"], arguments)
    return 'Error: a call is {"name": ..., "arguments": {...}}'
