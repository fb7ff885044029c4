"""What tests of several turns share: an environment that is made up, and responses in their parts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engines import opened, sampling

from dppo_cli.config.sections import Prompting, Sampling
from dppo_cli.environment.environment import Reply
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.turns import TurnsEngine
from dppo_cli.types import Completion, Messages, Prompt

PLAIN = Prompting("plain", None, {}, "refuse")
BOUND = 60
STOPS = "ABCDEFGHIJKLM"
"""In no special token's text."""


class Replies:
    """An environment that says what `reply` gives for a problem, what was said, and the turn. `asked`: of what."""

    schemas: Sequence[Mapping[str, Any]] = ()

    def __init__(
        self,
        reply: Callable[[int, Messages, int], str | Reply | None],
        role: str = "user",
        stop: Sequence[str] = (),
        turns: int = 3,
        turn_tokens: int | None = None,
    ) -> None:
        self.reply, self.role, self.stop, self.turns, self.turn_tokens = reply, role, stop, turns, turn_tokens
        self.asked: list[tuple[int, list[dict[str, str]], int]] = []
        self.given_up = 0

    def begin(self, prompt: Prompt, said: Messages, turn: int) -> Callable[[], Reply]:
        self.asked.append((prompt.index, [dict(message) for message in said], turn))
        found = self.reply(prompt.index, said, turn)
        reply = Reply([{"role": self.role, "content": found}]) if isinstance(found, str) else found or Reply()
        return lambda: reply

    def give_up(self) -> None:
        self.given_up += 1


def always(said: str, **how: Any) -> Replies:
    return Replies(lambda problem, messages, turn: said, **how)


def generate(
    of: Policy,
    environment: Replies,
    prompts: Sequence[Prompt],
    group: int = 3,
    how: Sampling | None = None,
    num_logprobs: int = 0,
    numbers: Sequence[int] | None = None,
    **engine: Any,
) -> list[list[Completion]]:
    with opened(of, **engine) as inner:
        turns = TurnsEngine(inner, environment, of, PLAIN)
        return in_order(turns.generate(prompts, group, how or sampling(BOUND), num_logprobs, 3, numbers))


def parts(completion: Completion) -> list[tuple[bool, list[int]]]:
    """Runs of tokens that the model has sampled, and that it has not."""
    found: list[tuple[bool, list[int]]] = []
    for token, sampled in zip(completion.token_ids_T.tolist(), completion.sampled_T.tolist(), strict=True):
        if not found or found[-1][0] != sampled:
            found.append((sampled, []))
        found[-1][1].append(token)
    return found
