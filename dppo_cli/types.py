"""What flows through a run.

    Prompt --rollout--> Completion --reward--> Score --advantage--> Group --learner--> Batch --loss--> step

Shapes: T tokens of one response, N sampled tokens of a batch (or of one response), K reported log-probs per token,
H hidden size, P padded prompts of length L, B responses of padded length R, V vocabulary. mu = the policy that
sampled, pi = the policy in training. Log-probs are natural logarithms, of the tempered and untruncated distribution.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class LogProbHead(Protocol):
    """Maps final hidden states [N, H] to log-probs float32 [N, V]."""

    def log_probs(self, hidden_NH: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PolicyReport:
    """What a policy says about N sampled tokens: always their log-prob, more where an approximation needs more.

    Example: `PolicyReport(logp_N=torch.tensor([-0.1, -2.3]))`, which is enough for the binary approximation.
    """

    logp_N: Tensor  # float32, log-prob of the sampled token
    topk_ids_NK: Tensor | None = None  # int64, its K most likely tokens
    topk_logp_NK: Tensor | None = None  # float32
    hidden_NH: Tensor | None = None  # final hidden states, from which `head` computes the whole distribution
    head: LogProbHead | None = None

    def __post_init__(self) -> None:
        n = self.logp_N.shape[0]
        assert self.logp_N.shape == (n,) and self.logp_N.dtype == torch.float32
        assert (self.topk_ids_NK is None) == (self.topk_logp_NK is None)
        assert (self.hidden_NH is None) == (self.head is None)
        if self.topk_ids_NK is not None and self.topk_logp_NK is not None:
            assert self.topk_ids_NK.shape == self.topk_logp_NK.shape and self.topk_ids_NK.shape[0] == n
        assert self.hidden_NH is None or self.hidden_NH.shape[0] == n

    def __getitem__(self, rows: slice | Tensor) -> "PolicyReport":
        """The report of some of the tokens."""
        return self._map(lambda column: column[rows])

    def to(self, device: torch.device) -> "PolicyReport":
        return self._map(lambda column: column.to(device))

    def full_log_probs(self) -> Tensor:
        """The policy's whole distribution at each token, float32 [N, V]."""
        assert self.hidden_NH is not None and self.head is not None
        return self.head.log_probs(self.hidden_NH)

    @staticmethod
    def cat(reports: Sequence["PolicyReport"]) -> "PolicyReport":
        """The reports of several responses, one after the other."""

        def join(name: str) -> Any:
            columns = [getattr(report, name) for report in reports]
            return None if columns[0] is None else torch.cat(columns)

        return PolicyReport(
            join("logp_N"), join("topk_ids_NK"), join("topk_logp_NK"), join("hidden_NH"), reports[0].head
        )

    def _map(self, change: Callable[[Tensor], Tensor]) -> "PolicyReport":
        def maybe(column: Tensor | None) -> Tensor | None:
            return None if column is None else change(column)

        return PolicyReport(
            change(self.logp_N), maybe(self.topk_ids_NK), maybe(self.topk_logp_NK), maybe(self.hidden_NH), self.head
        )


@dataclass(frozen=True)
class Example:
    """One problem of a data set, as text.

    Example: `Example("12+34=", answer="46", columns={"level": 1})`.
    """

    prompt: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # for a reward function that wants more


@dataclass(frozen=True)
class Prompt:
    """An example as the model gets it.

    Example: `Prompt(index=7, example=Example("1+2=", "3"), token_ids=(4, 13, 5, 16))`.
    """

    index: int  # its row in the data, by which messages name it
    example: Example
    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.token_ids, f"prompt {self.index} has no tokens"


class Status(StrEnum):
    """How a response ended."""

    FINISHED = "finished"  # by an end-of-sequence token
    CUT = "cut"  # at the token limit
    ABORTED = "aborted"  # by the engine, before either


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

    def __post_init__(self) -> None:
        assert self.token_ids_T.dtype == torch.int64 and self.token_ids_T.ndim == 1
        assert self.sampled_T.dtype == torch.bool and self.sampled_T.shape == self.token_ids_T.shape
        assert int(self.sampled_T.sum()) == self.mu.logp_N.shape[0]


@dataclass(frozen=True)
class Score:
    """What a reward says of one completion. `value` is None where it was not judged; `note` says why, or what happened.

    Example: `Score(0.7, parts={"exact": 1.0, "length": -0.3})`, `Score(None, note="the judge timed out")`.
    """

    value: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)  # of a mixture: each member's value by its name
    note: str = ""


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

    def __post_init__(self) -> None:
        assert len(self.scores) == len(self.completions)
        assert len(self.advantages) in (0, len(self.completions))
        assert self.anchors is None or len(self.anchors) == len(self.completions)


@dataclass(frozen=True)
class PaddedPrompts:
    """P prompts padded on the left, so that the responses that continue them start in the same column."""

    token_ids: tuple[tuple[int, ...], ...]  # the same, unpadded, on the host
    ids_PL: Tensor  # int64
    length_P1: Tensor  # int64, tokens of each

    @staticmethod
    def pad(token_ids: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> "PaddedPrompts":
        longest = max(len(ids) for ids in token_ids)
        rows = [[pad_id] * (longest - len(ids)) + list(ids) for ids in token_ids]
        lengths = [[len(ids)] for ids in token_ids]
        unpadded = tuple(tuple(ids) for ids in token_ids)
        return PaddedPrompts(unpadded, torch.tensor(rows, device=device), torch.tensor(lengths, device=device))

    def positions(self) -> Tensor:
        """int64 [P, L]; the first token of each prompt has position 0."""
        width = self.ids_PL.shape[1]
        return (torch.arange(width, device=self.ids_PL.device) - (width - self.length_P1)).clamp(min=0)

    def mask(self, more: int) -> Tensor | None:
        """Attention mask int64 [P, L + more] of the prompts and `more` columns after them: 0 on padding.

        None where there is no padding: attention needs no mask then, and is faster without one.
        """
        width = self.ids_PL.shape[1]
        if all(len(ids) == width for ids in self.token_ids):
            return None
        column_1X = torch.arange(width + more, device=self.ids_PL.device)[None]
        return (column_1X >= width - self.length_P1).long()


@dataclass(frozen=True)
class Sample:
    """A completion as the update sees it. `prompt`: the number of its prompt among those of the update."""

    prompt: int
    completion: Completion
    advantage: float
    anchor: PolicyReport  # of the policy that the trust region is centred on


@dataclass(frozen=True)
class Batch:
    """P prompts once each, B responses to them, and the N sampled tokens one after the other.

    Example: of the responses [5, 6] and [9], with all tokens sampled, `response_ids_BR` is [[5, 6], [9, pad]],
    `row_N` [0, 0, 1], `position_N` [0, 1, 0] and `token_N` [5, 6, 9].
    """

    prompts: PaddedPrompts
    number_P: tuple[int, ...]  # each prompt's number among those of the update
    prompt_B: Tensor  # int64, which of the P prompts a response belongs to
    response_ids_BR: Tensor  # int64, padded on the right
    length_B: Tensor  # int64, tokens of each response
    row_N: Tensor  # int64, the response that a token is part of
    position_N: Tensor  # int64, its position there; the response's first token has position 0
    token_N: Tensor  # int64
    advantage_N: Tensor  # float32
    mu: PolicyReport
    anchor: PolicyReport

    def __post_init__(self) -> None:
        n = self.token_N.shape
        assert self.response_ids_BR.dtype == self.token_N.dtype == torch.int64
        assert self.prompt_B.shape == self.length_B.shape == self.response_ids_BR.shape[:1]
        assert self.row_N.shape == self.position_N.shape == self.advantage_N.shape == n
        assert self.mu.logp_N.shape == self.anchor.logp_N.shape == n

    @property
    def num_positions(self) -> int:
        """Tokens and padding of the responses."""
        return self.response_ids_BR.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens of the responses."""
        return int(self.length_B.sum())

    def whole_ids(self, pad_id: int) -> Tensor:
        """Each prompt and response as one sequence, int64 [B, L + R], padded on the right."""
        prompt_ids = [torch.tensor(ids, device=self.token_N.device) for ids in self.prompts.token_ids]
        responses = zip(self.prompt_B.tolist(), self.response_ids_BR, self.length_B.tolist(), strict=True)
        whole = [torch.cat([prompt_ids[p], ids_R[:n]]) for p, ids_R, n in responses]
        return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=pad_id)

    @staticmethod
    def pack(samples: Sequence[Sample], prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> "Batch":
        """Lay out `samples` in their order. `prompts`: token ids of the update's prompts, by their number."""
        column = {number: p for p, number in enumerate(dict.fromkeys(s.prompt for s in samples))}
        lengths = [s.completion.token_ids_T.shape[0] for s in samples]
        response_ids_BR = torch.full((len(samples), max(lengths)), pad_id)
        rows, positions, advantages = [], [], []
        for b, sample in enumerate(samples):
            response_ids_BR[b, : lengths[b]] = sample.completion.token_ids_T
            positions.append(sample.completion.sampled_T.nonzero().squeeze(-1))
            rows.append(torch.full_like(positions[-1], b))
            advantages.append(torch.full(positions[-1].shape, sample.advantage))
        row_N, position_N = torch.cat(rows), torch.cat(positions)
        return Batch(
            prompts=PaddedPrompts.pad([prompts[number] for number in column], pad_id, device),
            number_P=tuple(column),
            prompt_B=torch.tensor([column[s.prompt] for s in samples], device=device),
            response_ids_BR=response_ids_BR.to(device),
            length_B=torch.tensor(lengths, device=device),
            row_N=row_N.to(device),
            position_N=position_N.to(device),
            token_N=response_ids_BR[row_N, position_N].to(device),
            advantage_N=torch.cat(advantages).to(device),
            mu=PolicyReport.cat([s.completion.mu for s in samples]).to(device),
            anchor=PolicyReport.cat([s.anchor for s in samples]).to(device),
        )


@dataclass(frozen=True)
class TokenStats:
    """The sampled tokens of an update as the loss saw them, on the CPU, [N] each; float32 unless said otherwise."""

    token_N: Tensor  # int64
    mu_N: Tensor
    pi_N: Tensor
    log_ratio_N: Tensor  # log pi/mu
    divergence_N: Tensor
    advantage_N: Tensor
    keep_N: Tensor  # bool
    entropy_N: Tensor  # nats
    reference_kl_N: Tensor  # log pi/ref, nats; 0 without a reference term

    @staticmethod
    def cat(parts: Sequence["TokenStats"]) -> "TokenStats":
        return TokenStats(*(torch.cat([getattr(p, f.name) for p in parts]) for f in fields(TokenStats)))


@dataclass(frozen=True)
class RunInfo:
    """A run as it starts."""

    run_dir: Path
    step: int  # after which it goes on; 0 for a new one
    steps: int  # of the whole run
    model: str
    parameters: int
    trained_parameters: int
    device: str
    dtype: str
    samples_with: str  # the rollout engine's weights, in words


@dataclass(frozen=True)
class EvalReport:
    """An evaluation after `step` steps. Accuracy and its standard error in [0, 1], None if not measured."""

    step: int
    accuracy: float | None
    standard_error: float | None
    groups: Sequence[Group]


@dataclass(frozen=True)
class StepReport:
    """A finished step: the line of metrics.jsonl, its groups, and the token statistics of each update."""

    metrics: Mapping[str, Any]
    groups: Sequence[Group]
    updates: Sequence[Sequence[TokenStats]]


class Listener(Protocol):
    """Hears a run: a console, a tracker, a report. An exception in one is told once and never reaches the run."""

    def started(self, run: RunInfo) -> None: ...
    def evaluated(self, report: EvalReport) -> None: ...
    def stepped(self, report: StepReport) -> None: ...
    def warned(self, text: str) -> None: ...

    def finished(self, summary: Mapping[str, Any] | None) -> None:
        """Comes last, and always. None: the run ended by an error, or before its first step."""
        ...
