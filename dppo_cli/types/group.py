"""From a problem of a data set to a group of scored completions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from dppo_cli.types.report import PolicyReport

Messages = Sequence[Mapping[str, str]]
"""A conversation: `{"role": "system" | "user" | "assistant" | "tool", "content": text}` each."""


@dataclass(frozen=True)
class Example:
    """One problem of a data set, as text.

    Example: `Example("12+34=", answer="46", columns={"level": 1})`.
    """

    prompt: str  # of a conversation: the text of its last message
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # for a reward function that wants more
    messages: Messages = ()  # where the data set brings a conversation


@dataclass(frozen=True)
class Prompt:
    """An example as the model gets it.

    Example: `Prompt(index=7, example=Example("1+2=", "3"), token_ids=(4, 13, 5, 16))`.
    """

    index: int  # its row in the data, by which messages name it
    example: Example
    token_ids: tuple[int, ...]
    messages: Messages = ()  # what the chat template was given; empty for a plain prompt

    def __post_init__(self) -> None:
        assert self.token_ids, f"prompt {self.index} has no tokens"

    def conversation(self, said: Messages = ()) -> list[dict[str, str]]:
        """All of it, with what was said since; a prompt without messages is one of the user.

        Example: `[{"role": "user", "content": "12+34="}, {"role": "assistant", "content": "46"}]`.
        """
        return [*map(dict, self.messages or [{"role": "user", "content": self.example.prompt}]), *map(dict, said)]


class Status(StrEnum):
    """How a response ended."""

    FINISHED = "finished"  # by an end-of-sequence token
    CUT = "cut"  # at the token limit
    ABORTED = "aborted"  # by the engine or the environment, before either


@dataclass(frozen=True)
class Completion:
    """One response as token ids; `text` is for rewards and people, and is never tokenised again.

    Example: a response of two tokens, both sampled by the policy of version 3:
    `Completion(torch.tensor([8, 1]), torch.tensor([True, True]), report, "5", Status.FINISHED, versions=(3,))`.
    """

    token_ids_T: Tensor  # int64, with the end-of-sequence token where there is one: it is an ordinary action
    sampled_T: Tensor  # bool, the response mask: False for tokens that the model did not sample
    mu: PolicyReport  # of the sampled tokens only, in their order
    text: str
    status: Status
    versions: tuple[int, ...]  # of the policy that sampled it: the number of rollouts trained on before
    messages: Messages = ()  # of several turns: what was said since the prompt; `text` is the model's last turn

    def __post_init__(self) -> None:
        assert self.token_ids_T.dtype == torch.int64 and self.token_ids_T.ndim == 1
        assert self.sampled_T.dtype == torch.bool and self.sampled_T.shape == self.token_ids_T.shape
        assert int(self.sampled_T.sum()) == self.mu.logp_N.shape[0]

    @property
    def said(self) -> Messages:
        """What was said since the prompt, as messages; of one turn, that of the model."""
        return self.messages or [{"role": "assistant", "content": self.text}]

    @property
    def written(self) -> str:
        """The same as one text, for plain prompts."""
        return "".join(message["content"] for message in self.said)

    @property
    def turns(self) -> int:
        """How often the model has begun to speak."""
        sampled_T = self.sampled_T
        return int(sampled_T[:1].sum() + (sampled_T[1:] & ~sampled_T[:-1]).sum())


@dataclass(frozen=True)
class Score:
    """What a reward says of one completion. `value` is None where it was not judged; `note` says why, or what happened.

    Example: `Score(0.7, parts={"exact": 1.0, "length": -0.3})`, `Score(None, note="the judge timed out")`.
    """

    value: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)  # of a mixture: each member's value by its name
    note: str = ""
    answer: str | None = None  # what the reward took for the response's answer, for a majority vote


@dataclass(frozen=True)
class Group:
    """One prompt with its completions, their scores and advantages. Groups may differ in size, and be empty.

    Example: `Group(prompt, completions=[a, b], scores=[Score(1.0), Score(0.0)], advantages=[0.5, -0.5])`.
    """

    prompt: Prompt
    completions: Sequence[Completion]
    scores: Sequence[Score]
    advantages: Sequence[float] = ()  # empty in an evaluation, which trains nothing
    anchors: Sequence[PolicyReport] | None = None  # the trainer's own report under anchor=recompute; None: mu
    kept: bool = False  # for the run's samples: updates say what they saw of each of its completions

    def __post_init__(self) -> None:
        assert len(self.scores) == len(self.completions)
        assert len(self.advantages) in (0, len(self.completions))
        assert self.anchors is None or len(self.anchors) == len(self.completions)
