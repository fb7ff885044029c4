"""What flows through a run: prompts, completions, samples, batches. Every field with shape, dtype and unit.

Shapes: T tokens of one response, N tokens of a batch (or of one response where a type serves both), K reported
log-probs per token, H hidden size, P prompts of padded length L, B responses of padded length R, V vocabulary.
mu = the policy that sampled, pi = the policy in training. Log-probs are natural logarithms, of the tempered and
untruncated distribution.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class LogProbHead(Protocol):
    """Maps final hidden states [N, H] to log-probs float32 [N, V]."""

    def log_probs(self, hidden_NH: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PolicyReport:
    """What a policy says about N sampled tokens: always their log-prob, more where an approximation needs more."""

    logp_N: Tensor  # float32, log-prob of the sampled token
    topk_ids_NK: Tensor | None = None  # int64, its K most likely tokens
    topk_logp_NK: Tensor | None = None  # float32
    hidden_NH: Tensor | None = None  # final hidden states, from which `head` rebuilds the whole distribution
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
class Prompt:
    """A problem as the model gets it. `index`: its place in the data, by which messages name it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    answer: str
    columns: Mapping[str, Any]

    def __post_init__(self) -> None:
        assert self.token_ids, f"prompt {self.index} has no tokens"


@dataclass(frozen=True)
class Completion:
    """One response to a prompt, as token ids; `text` is for rewards and eyes only and is never tokenised again."""

    prompt: Prompt
    token_ids_T: Tensor  # int64, with the end-of-sequence token where there is one: it is an action like any other
    sampled_T: Tensor  # bool, the response mask: False for tokens that the model did not sample
    mu: PolicyReport  # of the sampled tokens only, in their order
    text: str
    finished: bool  # ended by itself, not cut at the token limit
    version: int  # which adapter sampled it: the number of rollouts trained on before

    def __post_init__(self) -> None:
        assert self.token_ids_T.dtype == torch.int64 and self.token_ids_T.ndim == 1
        assert self.sampled_T.dtype == torch.bool and self.sampled_T.shape == self.token_ids_T.shape
        assert int(self.sampled_T.sum()) == self.mu.logp_N.shape[0]


@dataclass(frozen=True)
class Sample:
    """A completion with what the update needs. `anchor`: `completion.mu`, or pi_old's report under anchor=recompute."""

    completion: Completion
    reward: float  # NaN: the reward function declined to judge it
    advantage: float
    anchor: PolicyReport


@dataclass(frozen=True)
class Prompts:
    """P prompts padded on the left, so that what continues them begins at one place."""

    token_ids: tuple[tuple[int, ...], ...]  # the same, unpadded, on the host
    ids_PL: Tensor  # int64
    length_P1: Tensor  # int64, tokens of each

    @staticmethod
    def pad(token_ids: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> "Prompts":
        longest = max(len(ids) for ids in token_ids)
        rows = [[pad_id] * (longest - len(ids)) + list(ids) for ids in token_ids]
        lengths = [[len(ids)] for ids in token_ids]
        unpadded = tuple(tuple(ids) for ids in token_ids)
        return Prompts(unpadded, torch.tensor(rows, device=device), torch.tensor(lengths, device=device))

    def positions(self) -> Tensor:
        """int64 [P, L]; the first token of each prompt stands at position 0."""
        width = self.ids_PL.shape[1]
        return (torch.arange(width, device=self.ids_PL.device) - (width - self.length_P1)).clamp(min=0)

    def mask(self, more: int) -> Tensor | None:
        """Attention mask int64 [P, L + more] of the prompts and `more` places after them: 0 on padding.

        None where there is no padding: attention needs no mask then, and is faster without one.
        """
        width = self.ids_PL.shape[1]
        if all(len(ids) == width for ids in self.token_ids):
            return None
        place_1X = torch.arange(width + more, device=self.ids_PL.device)[None]
        return (place_1X >= width - self.length_P1).long()


@dataclass(frozen=True)
class Batch:
    """P distinct prompts once each, B responses to them, and the N sampled tokens one after the other.

    `row_N`, `place_N`: whose response a token is part of, and its place there; the response's first token has place 0.
    """

    prompts: Prompts
    prompt_B: Tensor  # int64, which prompt a response belongs to
    response_ids_BR: Tensor  # int64, padded on the right
    length_B: Tensor  # int64, tokens of each response
    row_N: Tensor  # int64
    place_N: Tensor  # int64
    token_N: Tensor  # int64
    advantage_N: Tensor  # float32
    mu: PolicyReport
    anchor: PolicyReport

    def __post_init__(self) -> None:
        n = self.token_N.shape
        assert self.response_ids_BR.dtype == self.token_N.dtype == torch.int64
        assert self.prompt_B.shape == self.length_B.shape == self.response_ids_BR.shape[:1]
        assert self.row_N.shape == self.place_N.shape == self.advantage_N.shape == n
        assert self.mu.logp_N.shape == self.anchor.logp_N.shape == n

    @property
    def places(self) -> int:
        """Tokens and padding of the responses."""
        return self.response_ids_BR.numel()

    @property
    def tokens(self) -> int:
        """Tokens of the responses."""
        return int(self.length_B.sum())

    def whole_ids(self, pad_id: int) -> Tensor:
        """Every prompt and response as one sequence, int64 [B, L + R], padded on the right."""
        prompt_ids = [torch.tensor(ids, device=self.token_N.device) for ids in self.prompts.token_ids]
        responses = zip(self.prompt_B.tolist(), self.response_ids_BR, self.length_B.tolist(), strict=True)
        whole = [torch.cat([prompt_ids[p], ids_R[:n]]) for p, ids_R, n in responses]
        return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=pad_id)

    @staticmethod
    def pack(samples: Sequence[Sample], pad_id: int, device: torch.device) -> "Batch":
        """Lay out the responses of `samples` in their order."""
        distinct: dict[tuple[int, ...], int] = {}
        prompt_of = [distinct.setdefault(s.completion.prompt.token_ids, len(distinct)) for s in samples]
        lengths = [s.completion.token_ids_T.shape[0] for s in samples]
        response_ids_BR = torch.full((len(samples), max(lengths)), pad_id)
        rows, places, advantages = [], [], []
        for b, sample in enumerate(samples):
            response_ids_BR[b, : lengths[b]] = sample.completion.token_ids_T
            places.append(sample.completion.sampled_T.nonzero().squeeze(-1))
            rows.append(torch.full_like(places[-1], b))
            advantages.append(torch.full(places[-1].shape, sample.advantage))
        row_N, place_N = torch.cat(rows), torch.cat(places)
        return Batch(
            prompts=Prompts.pad(list(distinct), pad_id, device),
            prompt_B=torch.tensor(prompt_of, device=device),
            response_ids_BR=response_ids_BR.to(device),
            length_B=torch.tensor(lengths, device=device),
            row_N=row_N.to(device),
            place_N=place_N.to(device),
            token_N=response_ids_BR[row_N, place_N].to(device),
            advantage_N=torch.cat(advantages).to(device),
            mu=PolicyReport.cat([s.completion.mu for s in samples]).to(device),
            anchor=PolicyReport.cat([s.anchor for s in samples]).to(device),
        )
