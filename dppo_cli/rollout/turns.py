"""Responses of several turns: the model speaks, an environment answers, the model goes on.

Each turn is sampled by the engine below as a response to all that was there before, token by token, so no turn is ever
tokenised again. What the environment says is part of the response, but nothing that the model sampled: it has no mu,
and no gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from dppo_cli.config.sections import Prompting, Sampling
from dppo_cli.environment.environment import INLINE, Environment, Reply
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import RolloutEngine, derive_seed
from dppo_cli.types import Completion, Messages, PolicyReport, Prompt, Status


class TurnsEngine:
    """See `RolloutEngine`. `sampling.max_new_tokens` is of the whole response, replies included."""

    def __init__(self, engine: RolloutEngine, environment: Environment, policy: Policy, prompting: Prompting) -> None:
        self.engine, self.environment = engine, environment
        self.policy, self.prompting = policy, prompting
        # A template that refuses replies is told before anything is sampled.
        self._tokens_of([{"role": environment.role, "content": "?"}], policy.eos_ids[0])

    def __enter__(self) -> "TurnsEngine":
        self.engine.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.environment.give_up()
        self.engine.__exit__(None, None, None)

    @property
    def samples_with(self) -> str:
        return f"{self.engine.samples_with}; in up to {self.environment.turns} turns"

    def sync(self, version: int) -> None:
        self.engine.sync(version)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: Sampling,
        num_logprobs: int,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        numbers = range(len(prompts)) if numbers is None else numbers
        first = self._of_turn(sampling, sampling.max_new_tokens, 1)
        begun = self.engine.generate(prompts, samples_per_prompt, first, num_logprobs, seed, numbers)
        return self._conversations(begun, prompts, samples_per_prompt, sampling, num_logprobs, seed, numbers)

    def _conversations(
        self,
        begun: Iterator[tuple[int, list[Completion]]],
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: Sampling,
        num_logprobs: int,
        seed: int,
        numbers: Sequence[int],
    ) -> Iterator[tuple[int, list[Completion]]]:
        """`begun`: the first turns."""
        groups: dict[int, list[Conversation]] = {}
        try:
            asked: list[Conversation] = []
            for p, completions in begun:
                groups[p] = [
                    Conversation(prompts[p], numbers[p] * samples_per_prompt + g, sampling.max_new_tokens)
                    for g in range(len(completions))
                ]
                for one, completion in zip(groups[p], completions, strict=True):
                    self._said(one, completion, sampling, asked)
                yield from _over(groups)
            turn = 1
            while True:
                going = [one for one in asked if self._answered(one)]
                yield from _over(groups)
                if not going:
                    return
                turn_seed, asked = derive_seed(seed, f"turn {turn}"), []
                for part in _in_parts(going, self.policy.positions):
                    contexts = [Prompt(one.prompt.index, one.prompt.example, one.context()) for one in part]
                    how = self._of_turn(sampling, max(one.room for one in part), turn + 1)
                    own = [one.number for one in part]
                    for i, completions in self.engine.generate(contexts, 1, how, num_logprobs, turn_seed, own):
                        self._said(part[i], completions[0] if completions else None, sampling, asked)
                turn += 1
        except BaseException:
            self.environment.give_up()
            raise

    def _of_turn(self, sampling: Sampling, room: int, turn: int) -> Sampling:
        # There is no reply to the last turn, so nothing interrupts it.
        stop = [] if turn == self.environment.turns else self.environment.stop
        tokens = min(room, self.environment.turn_tokens or room)
        return replace(sampling, max_new_tokens=tokens, stop=[*sampling.stop, *stop])

    def _said(
        self, one: "Conversation", completion: Completion | None, sampling: Sampling, asked: list["Conversation"]
    ) -> None:
        """Take a turn of the model, and ask for the reply where there may be one. `sampling`: of the whole response."""
        if completion is None:  # The engine has lost it.
            one.end(Status.ABORTED)
            return
        if len(completion.token_ids_T) > one.room:
            completion = self._cut(completion, one.room)
        interrupted = self._interrupted(completion, sampling)
        one.add(completion if interrupted is None else replace(completion, text=interrupted))
        goes_on = interrupted is not None or self.environment.role != INLINE
        if completion.status is not Status.FINISHED or not goes_on or one.turns == self.environment.turns:
            one.end(completion.status)
            return
        one.reply = self.environment.begin(one.prompt, one.messages, one.turns)
        asked.append(one)

    def _interrupted(self, turn: Completion, sampling: Sampling) -> str | None:
        """The text of a turn that one of the environment's texts has ended, with it; None for others."""
        if not self.environment.stop:
            return None
        ids = turn.token_ids_T.tolist()
        # With the text of special tokens, as where stop strings are looked for.
        whole = self.policy.tokenizer.decode(ids)
        ours = any(stop in whole for stop in self.environment.stop)
        return self.policy.decode(ids) if ours and not any(stop in whole for stop in sampling.stop) else None

    def _answered(self, one: "Conversation") -> bool:
        """Wait for the reply; whether the conversation goes on."""
        assert one.reply is not None
        reply, one.reply = one.reply(), None
        if reply.failed or not reply.messages:
            one.end(Status.ABORTED if reply.failed else Status.FINISHED)
            return False
        ids = self._tokens_of(reply.messages, ended_by=int(one.token_ids[-1][-1]))
        if len(ids) >= one.room:
            one.end(Status.CUT)
            return False
        one.answer(ids, reply)
        return True

    def _tokens_of(self, messages: Messages, ended_by: int) -> list[int]:
        return self.policy.encoder.reply(messages, self.prompting, self.policy.eos_ids, ended_by)

    def _cut(self, completion: Completion, room: int) -> Completion:
        """Its first tokens: those of a response sampled in a call with more room than its own."""
        ids_T = completion.token_ids_T[:room]
        return replace(
            completion,
            token_ids_T=ids_T,
            sampled_T=completion.sampled_T[:room],
            mu=completion.mu[:room],
            text=self.policy.decode(ids_T.tolist()),
            status=Status.CUT,
        )


@dataclass
class Conversation:
    """A response in the making. `number`: among all samples of the call. `room`: the tokens that it has left."""

    prompt: Prompt
    number: int
    room: int
    token_ids: list[Tensor] = field(default_factory=list)
    sampled: list[Tensor] = field(default_factory=list)
    mu: list[PolicyReport] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""
    turns: int = 0
    versions: set[int] = field(default_factory=set)
    reply: Callable[[], Reply] | None = None
    status: Status | None = None  # once it is over

    def add(self, turn: Completion) -> None:
        self._append(turn.token_ids_T, turn.sampled_T)
        self.mu.append(turn.mu)
        if self.messages and self.messages[-1]["role"] == INLINE:
            self.messages[-1]["content"] += turn.text
        else:
            self.messages.append({"role": INLINE, "content": turn.text})
        self.text = self.messages[-1]["content"]
        self.versions.update(turn.versions)
        self.turns += 1

    def answer(self, ids: Sequence[int], reply: Reply) -> None:
        ids_T = torch.tensor(ids, dtype=torch.int64)
        self._append(ids_T, torch.zeros_like(ids_T, dtype=torch.bool))
        for message in reply.messages:
            if message["role"] == INLINE:
                self.messages[-1]["content"] += message["content"]
            else:
                self.messages.append(dict(message))

    def end(self, status: Status) -> None:
        self.status = status

    def context(self) -> tuple[int, ...]:
        """What the next turn follows."""
        return (*self.prompt.token_ids, *torch.cat(self.token_ids).tolist())

    def completion(self) -> Completion:
        assert self.status is not None
        return Completion(
            token_ids_T=torch.cat(self.token_ids),
            sampled_T=torch.cat(self.sampled),
            mu=PolicyReport.cat(self.mu),
            text=self.text,
            status=self.status,
            versions=tuple(sorted(self.versions)),
            messages=tuple(self.messages) if len(self.messages) > 1 else (),
        )

    def _append(self, ids_T: Tensor, sampled_T: Tensor) -> None:
        self.token_ids.append(ids_T)
        self.sampled.append(sampled_T)
        self.room -= len(ids_T)


def _over(groups: dict[int, list[Conversation]]) -> Iterator[tuple[int, list[Completion]]]:
    """The groups of which every conversation is over; they are taken out."""
    for number in [number for number, group in groups.items() if all(one.status is not None for one in group)]:
        yield number, [one.completion() for one in groups.pop(number)]


def _in_parts(going: Sequence[Conversation], positions: int | None) -> Iterator[list[Conversation]]:
    """Those that can be sampled in one call: its longest context and its largest room fit into the model's positions.

    Each by itself does, and nearly always all of them do.
    """
    part: list[Conversation] = []
    context = room = 0
    for one in sorted(going, key=lambda one: one.room):  # Nearly by context, the longest first.
        context, room = max(context, len(one.context())), max(room, one.room)
        if part and positions is not None and context + room > positions:
            yield part
            part, context, room = [], len(one.context()), one.room
        part.append(one)
    yield part
