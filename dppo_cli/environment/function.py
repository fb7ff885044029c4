"""Replies by the user's own Python function, which runs in processes of its own."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from dppo_cli.calls.pool import CallError, Kind, Pool
from dppo_cli.config.build import CodePath
from dppo_cli.config.checks import check_choice, check_rules
from dppo_cli.environment.environment import INLINE, Reply
from dppo_cli.errors import ConfigError, ReplyError
from dppo_cli.types import Messages, Prompt

ROLES = ("user", "tool", "system", INLINE)
KIND = Kind("reply", "environment", ReplyError)


@dataclass(frozen=True)
class Function:
    """See conf/environment/function.yaml for the fields."""

    path: CodePath
    role: str
    stop: list[str]
    turns: int
    turn_tokens: int | None
    reply_characters: int
    timeout: float
    max_failures: int
    workers: int
    memory_gib: float

    def __post_init__(self) -> None:
        check_choice("environment.role", self.role, ROLES)
        rules = {"max_failures >= 1": self.max_failures >= 1, "stop has no empty text": all(self.stop)}
        check_rules("environment", self, {**rules, **rules_of_turns(self)})
        if self.role == INLINE and not self.stop:
            raise ConfigError(
                f"environment.role={INLINE} goes on with the model's own turn, so it needs a text that interrupts it; "
                'add environment.stop=["="], for example'
            )

    def load(self, warn: Callable[[str], None]) -> "FunctionEnvironment":
        where, _, name = self.path.rpartition(":")
        if not where or not name:
            raise ReplyError(f"environment.path={self.path} names no function; write file.py:function")
        return FunctionEnvironment(
            self, Pool(self.path, self.workers, self.timeout, self.memory_gib, stateless=True, kind=KIND), warn
        )


class FunctionEnvironment:
    """See `Environment`. A call that hangs or dies is killed; its response ends there, as aborted."""

    schemas: Sequence[Mapping[str, Any]] = ()

    def __init__(self, option: Function, pool: Pool, warn: Callable[[str], None]) -> None:
        self.option, self.pool, self.warn = option, pool, warn
        self.role, self.stop = option.role, option.stop
        self.turns, self.turn_tokens = option.turns, option.turn_tokens
        self.failures = 0  # in a row

    def begin(self, prompt: Prompt, said: Messages, turn: int) -> Callable[[], Reply]:
        keywords = {
            **prompt.example.columns,
            "answer": prompt.example.columns.get("answer", prompt.example.answer),
            "messages": prompt.conversation(said),
            "turn": turn,
        }
        call = self.pool.begin((keywords, self.option.reply_characters))
        return lambda: self._reply(prompt, call)

    def give_up(self) -> None:
        self.pool.give_up()

    def _reply(self, prompt: Prompt, call: "Future[dict[str, Any] | CallError]") -> Reply:
        answer = call.result()
        named = f"the environment {self.option.path}"
        if isinstance(answer, CallError):
            self.failures += 1
            text = f"{named} failed on problem {prompt.index}: {answer}"
            if self.failures >= self.option.max_failures:
                raise ReplyError(f"{text}; that is environment.max_failures={self.option.max_failures} times in a row")
            self.warn(f"{text}; the response ends there, and is not trained on")
            return Reply(failed=str(answer))
        self.failures = 0
        if "raised" in answer:
            raise ReplyError(f"{named} failed on problem {prompt.index}: {answer['raised']}")
        expected = "a text, a message with role and content, a list of them, or None to end the conversation"
        if "returned" in answer:
            raise ReplyError(f"{named} returned {answer['returned']} for problem {prompt.index}; expected {expected}")
        messages = [self._message(part) for part in answer["reply"]]
        roles = [INLINE] if self.role == INLINE else [role for role in ROLES if role != INLINE]
        if wrong := [message["role"] for message in messages if message["role"] not in roles]:
            raise ReplyError(
                f"{named} returned a message of the role {wrong[0]!r} for problem {prompt.index}; with "
                f"environment.role={self.role} it may be {', '.join(roles)}"
            )
        return Reply(messages)

    def _message(self, part: str | Mapping[str, str]) -> dict[str, str]:
        return {"role": self.role, "content": part} if isinstance(part, str) else dict(part)


def rules_of_turns(of: Any) -> dict[str, bool]:
    """The rules of the options that every environment has, for `check_rules`."""
    return {
        "turns >= 2": of.turns >= 2,
        "turn_tokens >= 1 or null": of.turn_tokens is None or of.turn_tokens >= 1,
        "reply_characters >= 1": of.reply_characters >= 1,
        "0 < timeout <= 86400": 0 < of.timeout <= 86400,
        "workers >= 1": of.workers >= 1,
        "memory_gib > 0 and finite": 0 < of.memory_gib < math.inf,
    }
