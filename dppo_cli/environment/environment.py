"""The interface of environments: a conversation in, what is said next out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from dppo_cli.types import Messages, Prompt

INLINE = "assistant"
"""The role of what is put into the model's own turn, which then goes on."""


@dataclass(frozen=True)
class Reply:
    """What is said after a turn of the model. Without messages the conversation is over; `failed` says why it broke.

    Example: `Reply([{"role": "tool", "content": "391"}])`.
    """

    messages: Messages = ()
    failed: str = ""


class Environment(Protocol):
    """Answers the model.

    `role`: in which it speaks, in general; INLINE: within the model's own turn. `stop`: texts that end a turn of the
    model, beside its own end. `turns`: most turns of the model in a response. `turn_tokens`: most tokens of one; None:
    what the response has left. `schemas`: JSON schemas of tools, for the chat template.
    """

    @property
    def role(self) -> str: ...

    @property
    def stop(self) -> Sequence[str]: ...

    @property
    def turns(self) -> int: ...

    @property
    def turn_tokens(self) -> int | None: ...

    @property
    def schemas(self) -> Sequence[Mapping[str, Any]]: ...

    def begin(self, prompt: Prompt, said: Messages, turn: int) -> Callable[[], Reply]:
        """Ask for a reply to `said`, what was said since the prompt, after turn number `turn`. Returns at once.

        What it returns waits for the reply. Raises ReplyError where a function is wrong, or fails too often.
        """
        ...

    def give_up(self) -> None:
        """End what was begun: nothing waits for it any more."""
        ...


class EnvironmentSource(Protocol):
    """An environment option. `load` raises ReplyError where a function cannot be had; `warn` is told what fails.

    It gives None where a response is one turn of the model; else the object has its `turns`.
    """

    def load(self, warn: Callable[[str], None]) -> Environment | None: ...


def turns_of(source: EnvironmentSource) -> int:
    """Most turns of the model in a response."""
    return int(getattr(source, "turns", 1))


@dataclass(frozen=True)
class NoEnvironment:
    """A response is one turn of the model."""

    def load(self, warn: Callable[[str], None]) -> None:
        return None
