"""What an update saw of single samples: of those that are kept. Shapes: N tokens of a batch, C at a time, K reported.

Distributions exist only chunk by chunk, so log pi of mu's most likely tokens is taken on the way.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from dppo_cli.algorithm.loss import LogProbs, Visitor
from dppo_cli.types import PolicyReport, Sample, SampleStats, TokenStats


class KeptSamples:
    """Those of a batch. `samples`: all of the batch in its order; `mu`: the report on their tokens."""

    def __init__(self, samples: Sequence[Sample], mu: PolicyReport) -> None:
        self.samples, self.mu = samples, mu
        self.topk_logp_pi_NK: Tensor | None = None
        if mu.topk_logp_NK is not None and any(sample.kept for sample in samples):
            self.topk_logp_pi_NK = torch.empty_like(mu.topk_logp_NK)

    def at(self, log_probs: LogProbs) -> LogProbs:
        """`log_probs`, with a look at each chunk that it passes on."""
        ids_NK, found_NK = self.mu.topk_ids_NK, self.topk_logp_pi_NK
        if ids_NK is None or found_NK is None:
            return log_probs

        def looking(visit: Visitor) -> tuple[Tensor, Tensor]:
            def visit_both(rows: slice, log_pi_CV: Tensor) -> None:
                visit(rows, log_pi_CV)
                found_NK[rows] = log_pi_CV.gather(-1, ids_NK[rows])

            return log_probs(visit_both)

        return looking

    def found(self, seen: TokenStats) -> list[SampleStats]:
        """Of each kept sample. `seen`: the statistics of the batch."""
        ends = list(accumulate(len(sample.completion.mu.logp_N) for sample in self.samples))
        top_NK = self.topk_logp_pi_NK
        found = []
        for sample, start, end in zip(self.samples, [0, *ends], ends, strict=False):
            if sample.kept:
                # A copy, because a view would hold the rows of all others until the step ends.
                of_sample_NK = None if top_NK is None else top_NK[start:end].to("cpu", copy=True)
                found.append(SampleStats(sample.completion, seen[start:end], of_sample_NK))
        return found
