"""What a policy says about tokens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
