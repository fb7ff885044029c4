"""What flows through a run: prompts, completions, samples, batches. Every field with shape, dtype and unit.

Shapes: T tokens of one response, N tokens of a batch (or of one response where a type serves both), K reported
log-probs per token, H hidden size, B sequences, L padded length, V vocabulary. mu = the policy that sampled, pi = the
policy in training. Log-probs are natural logarithms, of the tempered and untruncated distribution.
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

    @property
    def length(self) -> int:
        """Tokens of prompt and response together: what a forward pass pays for."""
        return len(self.completion.prompt.token_ids) + self.completion.token_ids_T.shape[0]


@dataclass(frozen=True)
class Batch:
    """Whole sequences, padded on the right, with their N sampled tokens listed one after the other.

    Right padding needs no attention mask: under causal attention no real token sees what stands to its right.
    `row_N`, `column_N`: where the hidden state stands that *predicts* a token, one place to the left of it.
    """

    input_ids_BL: Tensor  # int64
    length_B: Tensor  # int64, real tokens of each sequence
    row_N: Tensor  # int64
    column_N: Tensor  # int64
    token_N: Tensor  # int64
    advantage_N: Tensor  # float32
    mu: PolicyReport
    anchor: PolicyReport

    def __post_init__(self) -> None:
        n = self.token_N.shape
        assert self.input_ids_BL.dtype == self.token_N.dtype == torch.int64
        assert self.row_N.shape == self.column_N.shape == self.advantage_N.shape == n
        assert self.mu.logp_N.shape == self.anchor.logp_N.shape == n

    @staticmethod
    def pack(samples: Sequence[Sample], pad_id: int, device: torch.device) -> "Batch":
        """Lay out the sequences of `samples` in their order."""
        input_ids_BL = torch.full((len(samples), max(s.length for s in samples)), pad_id, dtype=torch.int64)
        rows, columns, advantages = [], [], []
        for b, sample in enumerate(samples):
            prompt_ids = torch.tensor(sample.completion.prompt.token_ids)
            input_ids_BL[b, : sample.length] = torch.cat([prompt_ids, sample.completion.token_ids_T])
            column = sample.completion.sampled_T.nonzero().squeeze(-1) + len(prompt_ids) - 1
            columns.append(column)
            rows.append(torch.full_like(column, b))
            advantages.append(torch.full(column.shape, sample.advantage))
        row_N, column_N = torch.cat(rows), torch.cat(columns)
        return Batch(
            input_ids_BL=input_ids_BL.to(device),
            length_B=torch.tensor([s.length for s in samples]),
            row_N=row_N.to(device),
            column_N=column_N.to(device),
            token_N=input_ids_BL[row_N, column_N + 1].to(device),
            advantage_N=torch.cat(advantages).to(device),
            mu=PolicyReport.cat([s.completion.mu for s in samples]).to(device),
            anchor=PolicyReport.cat([s.anchor for s in samples]).to(device),
        )
