"""Six tokens for tests of the loss, and what it makes of them. Shapes: N tokens, C of them at a time, V vocabulary."""

from collections.abc import Sequence
from dataclasses import replace

import make
import reference
import torch
from torch import Tensor

from dppo_cli.algorithm.loss import LogProbs, Loss, Visitor
from dppo_cli.algorithm.objective import DPPO
from dppo_cli.types import Batch, PolicyReport, Sample, TokenStats

# Over a vocabulary of four, in two responses.
TOKENS = [1, 0, 3, 2, 0, 1]
ADVANTAGES = [1.0, 1.0, 1.0, -1.0, -1.0, -1.0]
MU = [
    [0.500, 0.250, 0.125, 0.125],
    [0.500, 0.250, 0.125, 0.125],
    [0.425, 0.375, 0.125, 0.075],
    [0.350, 0.250, 0.200, 0.200],
    [0.500, 0.220, 0.180, 0.100],
    [0.125, 0.500, 0.250, 0.125],
]
PI = [
    [0.250, 0.500, 0.125, 0.125],
    [0.400, 0.350, 0.125, 0.125],
    [0.400, 0.300, 0.150, 0.150],
    [0.300, 0.300, 0.300, 0.100],
    [0.400, 0.300, 0.200, 0.100],
    [0.200, 0.490, 0.200, 0.110],
]
REFERENCE = [0.25, 0.5, 0.1, 0.2, 0.5, 0.49]
"""Of the sampled tokens."""
LOW, HIGH, CAP, WEIGHT = 0.05, 0.2, 1.6, 0.5
DPPO_CAPPED = DPPO(ratio_cap=CAP)


def batch(mu: Sequence[Sequence[float]] = MU, anchor: Sequence[Sequence[float]] | None = None, k: int = 2) -> Batch:
    """The six tokens as two responses of three to one prompt, with reports of K tokens."""
    samples = []
    for rows in (slice(0, 3), slice(3, 6)):
        around = report(mu if anchor is None else anchor, k)[rows]
        completion = replace(make.completion(TOKENS[rows]), mu=report(mu, k)[rows])
        samples.append(Sample(0, completion, ADVANTAGES[rows.start], around))
    return Batch.pack(samples, [(3,)], pad_id=0, device=torch.device("cpu"))


def report(rows: Sequence[Sequence[float]], k: int) -> PolicyReport:
    log_p_NV = reference.logs(*rows)
    top = log_p_NV.topk(k, dim=-1)
    return PolicyReport(of_tokens(log_p_NV), top.indices, top.values)


def of_tokens(value_NV: Tensor) -> Tensor:
    return value_NV.gather(-1, torch.tensor(TOKENS)[:, None])[:, 0]


def chunked(log_pi_NV: Tensor, chunk: int) -> LogProbs:
    """What a policy gives of these distributions; the log-probs of the tokens are `log_pi_NV`'s."""

    def log_probs(visit: Visitor) -> tuple[Tensor, Tensor]:
        for start in range(0, len(TOKENS), chunk):
            visit(slice(start, start + chunk), log_pi_NV.detach()[start : start + chunk])
        return of_tokens(log_pi_NV), -(log_pi_NV.exp() * log_pi_NV).sum(-1).detach()

    return log_probs


def run(
    loss: Loss, of: Batch | None = None, reference_N: Tensor | None = None, chunk: int = 4
) -> tuple[Tensor, Tensor, TokenStats]:
    """Losses, their gradient d (sum of losses) / d log pi at the sampled tokens, and what was seen."""
    log_pi_NV = reference.logs(*PI).requires_grad_()
    loss_N, seen = loss(batch() if of is None else of, chunked(log_pi_NV, chunk), reference_N)
    (gradient_NV,) = torch.autograd.grad(loss_N.sum(), log_pi_NV)
    return loss_N.detach(), of_tokens(gradient_NV), seen


def close(found_N: Tensor, expected: Sequence[float]) -> None:
    """To float32 rounding."""
    torch.testing.assert_close(found_N, torch.tensor(expected, dtype=torch.float32), rtol=2e-6, atol=2e-6)
