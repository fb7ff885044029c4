"""The loss that joins support, divergence, objective and reference term, against values worked out by hand and a
dense computation in float64.

Shapes: N tokens, C of them at a time, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import make
import pytest
import reference
import torch
from torch import Tensor

from dppo_cli.algorithm.approx import Binary, TopK
from dppo_cli.algorithm.divergence import KL, TotalVariation
from dppo_cli.algorithm.loss import LogProbs, Loss, Visitor
from dppo_cli.algorithm.objective import DPPO, IPO
from dppo_cli.errors import NumericalError
from dppo_cli.types import Batch, PolicyReport, Sample, TokenStats

# Six tokens over a vocabulary of four, in two responses.
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


def test_dppo_on_the_binary_total_variation_by_hand():
    loss_N, gradient_N, seen = run(Loss(Binary(), TotalVariation(LOW, HIGH), DPPO_CAPPED, kl_weight=0.0))
    # |pi - mu| of the sampled tokens.
    close(seen.divergence_N, [0.25, 0.1, 0.075, 0.1, 0.1, 0.01])
    # In order: too far up; back towards 1; up, and the ratio of 2 is capped; back towards 1; too far down; near.
    assert seen.keep_N.tolist() == [False, True, True, True, False, True]
    weights = [0.0, 0.8, 1.6, -1.5, 0.0, -0.98]
    close(gradient_N, [-w for w in weights])
    logs = [math.log(p) for p in (0.5, 0.4, 0.15, 0.3, 0.4, 0.49)]
    close(loss_N, [-w * logp for w, logp in zip(weights, logs, strict=True)])
    close(seen.mu_N, [0.25, 0.5, 0.075, 0.2, 0.5, 0.5])
    close(seen.pi_N, [0.5, 0.4, 0.15, 0.3, 0.4, 0.49])
    close(seen.log_ratio_N, [math.log(r) for r in (2.0, 0.8, 2.0, 1.5, 0.8, 0.98)])
    assert seen.token_N.tolist() == TOKENS
    assert seen.advantage_N.tolist() == ADVANTAGES
    close(seen.entropy_N, [-sum(p * math.log(p) for p in row) for row in PI])
    assert seen.reference_kl_N.tolist() == [0.0] * 6


def test_the_reference_term_by_hand():
    """Half of r/2 (log pi - log ref)^2 on every token, masked or not."""
    tv = TotalVariation(LOW, HIGH)
    without_N, without_gradient_N, _ = run(Loss(Binary(), tv, DPPO_CAPPED, kl_weight=0.0))
    loss_N, gradient_N, seen = run(Loss(Binary(), tv, DPPO_CAPPED, WEIGHT), reference_N=torch.tensor(REFERENCE).log())
    ratio = [2.0, 0.8, 2.0, 1.5, 0.8, 0.98]  # not capped
    above = [math.log(x) for x in (2.0, 0.8, 1.5, 1.5, 0.8, 1.0)]
    close(seen.reference_kl_N, above)
    close(loss_N - without_N, [WEIGHT * r * 0.5 * x**2 for r, x in zip(ratio, above, strict=True)])
    close(gradient_N - without_gradient_N, [WEIGHT * r * x for r, x in zip(ratio, above, strict=True)])


def dense(divergence: Callable[[list[float], list[float]], float], k: int | None, weight: float) -> list[list[float]]:
    """Divergence, keep-mask, loss and gradient of each token, one at a time, from whole distributions."""
    rows = []
    for token, advantage, mu, pi, ref in zip(TOKENS, ADVANTAGES, MU, PI, REFERENCE, strict=True):
        named = [token] if k is None else [*reference.likeliest(mu, k), token]
        d = divergence(reference.merged(mu, named), reference.merged(pi, named))
        keep = reference.keep(advantage, mu[token], pi[token], d, LOW, HIGH)
        ratio, log_pi, above = pi[token] / mu[token], math.log(pi[token]), math.log(pi[token] / ref)
        weighted = keep * min(ratio, CAP) * advantage
        loss = -weighted * log_pi + weight * ratio * 0.5 * above**2
        rows.append([d, keep, loss, -weighted + weight * ratio * above])
    return [list(column) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("weight", [0.0, WEIGHT], ids=["without_reference", "with_reference"])
@pytest.mark.parametrize("chunk", [1, 4, 6])
@pytest.mark.parametrize("divergence", [TotalVariation(LOW, HIGH), KL(LOW, HIGH)], ids=["tv", "kl"])
@pytest.mark.parametrize("k", [None, 1, 2, 4])
def test_the_loss_is_that_of_a_dense_computation(k, divergence, chunk, weight):
    naive = reference.tv if isinstance(divergence, TotalVariation) else reference.kl
    expected_d, expected_keep, expected_loss, expected_gradient = dense(naive, k, weight)
    loss = Loss(Binary() if k is None else TopK(k), divergence, DPPO_CAPPED, weight)
    reference_N = torch.tensor(REFERENCE).log() if weight else None
    loss_N, gradient_N, seen = run(loss, batch(k=k or 1), reference_N, chunk)
    close(seen.divergence_N, expected_d)
    assert seen.keep_N.tolist() == expected_keep
    close(loss_N, expected_loss)
    close(gradient_N, expected_gradient)


def test_the_top_k_kl_by_hand():
    """With K = 2 the first token's support is {0, 1, other}, and its divergence larger than that of {1, other}."""
    kl = KL(delta_low=0.05, delta_high=0.15)
    _, gradient_N, seen = run(Loss(TopK(2), kl, DPPO_CAPPED, kl_weight=0.0))
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    # Token 3 is not among the two most likely, so it is named beside them: {0, 1, 3, other}.
    third = 0.425 * math.log(0.425 / 0.4) + 0.375 * math.log(0.375 / 0.3) + 0.075 * math.log(0.075 / 0.15)
    third += 0.125 * math.log(0.125 / 0.15)
    assert seen.divergence_N[[0, 2]].tolist() == pytest.approx([first, third], abs=1e-6)
    assert seen.keep_N.tolist() == [False, True, True, True, True, True]
    close(gradient_N, [0.0, -0.8, -1.6, 1.5, 0.8, 0.98])
    # Between two outcomes it is 0.13, inside the trust region.
    _, gradient_N, seen = run(Loss(Binary(), kl, DPPO_CAPPED, kl_weight=0.0))
    assert seen.divergence_N[0].item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)
    assert seen.keep_N.all()
    close(gradient_N, [-1.6, -0.8, -1.6, 1.5, 0.8, 0.98])


def test_the_mask_is_around_the_anchor_and_the_weight_from_mu():
    """An anchor that equals pi masks nothing; the ratios stay those of mu."""
    tight = TotalVariation(delta_low=0.001, delta_high=0.001)
    loss = Loss(TopK(2), tight, DPPO(ratio_cap=None), kl_weight=0.0)
    _, around_mu_N, _ = run(loss)
    _, around_pi_N, seen = run(loss, batch(anchor=PI))
    assert (around_mu_N == 0).tolist() == [True, False, True, False, True, True]
    assert seen.keep_N.all()
    close(seen.divergence_N, [0.0] * 6)
    close(around_pi_N, [-2.0, -0.8, -2.0, 1.5, 0.8, 0.98])
    # pi is above mu and below the anchor at the first token, and the other way round at the second: up is away from
    # the anchor only there.
    beyond = [[0.2, 0.6, 0.1, 0.1], [0.3, 0.4, 0.15, 0.15], *PI[2:]]
    _, around_anchor_N, seen = run(loss, batch(anchor=beyond))
    assert seen.keep_N.tolist() == [True, False, True, True, True, True]
    close(seen.divergence_N[:2], [0.1, 0.1])
    close(around_anchor_N, [-2.0, 0.0, -2.0, 1.5, 0.8, 0.98])


def test_which_losses_need_tokens_without_advantage():
    tv = TotalVariation(LOW, HIGH)
    assert not Loss(Binary(), tv, DPPO_CAPPED, kl_weight=0.0).needs_all_tokens
    assert Loss(Binary(), tv, DPPO_CAPPED, kl_weight=0.1).needs_all_tokens
    assert Loss(Binary(), tv, IPO(0.1, 0.001, None), kl_weight=0.0).needs_all_tokens


def test_a_divergence_that_is_nan_is_refused():
    broken = [[math.nan] * 4, *MU[1:]]
    with pytest.raises(NumericalError, match="divergence of 1 of 6 tokens"):
        run(Loss(Binary(), TotalVariation(LOW, HIGH), DPPO_CAPPED, kl_weight=0.0), batch(broken))
