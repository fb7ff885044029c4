"""The loss that joins support, divergence, objective and reference term, against values worked out by hand and a
dense computation in float64.

Shapes: N tokens, C of them at a time, V vocabulary.
"""

import math
from collections.abc import Callable

import make
import pytest
import reference
import torch
from six_tokens import ADVANTAGES, CAP, DPPO_CAPPED, HIGH, LOW, MU, PI, REFERENCE, TOKENS, WEIGHT, batch, close, run

from dppo_cli.algorithm.approx import Binary, TopK
from dppo_cli.algorithm.divergence import KL, TotalVariation
from dppo_cli.algorithm.objective import DPPO, IPO
from dppo_cli.errors import NumericalError


def test_dppo_on_the_binary_total_variation_by_hand():
    loss_N, gradient_N, seen = run(make.loss(Binary(), TotalVariation(LOW, HIGH), DPPO_CAPPED, kl_weight=0.0))
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
    without_N, without_gradient_N, _ = run(make.loss(Binary(), tv, DPPO_CAPPED, kl_weight=0.0))
    with_term = make.loss(Binary(), tv, DPPO_CAPPED, WEIGHT)
    loss_N, gradient_N, seen = run(with_term, reference_N=torch.tensor(REFERENCE).log())
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
    loss = make.loss(Binary() if k is None else TopK(k), divergence, DPPO_CAPPED, weight)
    reference_N = torch.tensor(REFERENCE).log() if weight else None
    loss_N, gradient_N, seen = run(loss, batch(k=k or 1), reference_N, chunk)
    close(seen.divergence_N, expected_d)
    assert seen.keep_N.tolist() == expected_keep
    close(loss_N, expected_loss)
    close(gradient_N, expected_gradient)


def test_the_top_k_kl_by_hand():
    """With K = 2 the first token's support is {0, 1, other}, and its divergence larger than that of {1, other}."""
    kl = KL(delta_low=0.05, delta_high=0.15)
    _, gradient_N, seen = run(make.loss(TopK(2), kl, DPPO_CAPPED, kl_weight=0.0))
    first = 0.5 * math.log(2) - 0.25 * math.log(2)
    # Token 3 is not among the two most likely, so it is named beside them: {0, 1, 3, other}.
    third = 0.425 * math.log(0.425 / 0.4) + 0.375 * math.log(0.375 / 0.3) + 0.075 * math.log(0.075 / 0.15)
    third += 0.125 * math.log(0.125 / 0.15)
    assert seen.divergence_N[[0, 2]].tolist() == pytest.approx([first, third], abs=1e-6)
    assert seen.keep_N.tolist() == [False, True, True, True, True, True]
    close(gradient_N, [0.0, -0.8, -1.6, 1.5, 0.8, 0.98])
    # Between two outcomes it is 0.13, inside the trust region.
    _, gradient_N, seen = run(make.loss(Binary(), kl, DPPO_CAPPED, kl_weight=0.0))
    assert seen.divergence_N[0].item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)
    assert seen.keep_N.all()
    close(gradient_N, [-1.6, -0.8, -1.6, 1.5, 0.8, 0.98])


def test_the_mask_is_around_the_anchor_and_the_weight_from_mu():
    """An anchor that equals pi masks nothing; the ratios stay those of mu."""
    tight = TotalVariation(delta_low=0.001, delta_high=0.001)
    loss = make.loss(TopK(2), tight, DPPO(ratio_cap=None), kl_weight=0.0)
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
    assert not make.loss(Binary(), tv, DPPO_CAPPED, kl_weight=0.0).needs_all_tokens
    assert make.loss(Binary(), tv, DPPO_CAPPED, kl_weight=0.1).needs_all_tokens
    assert make.loss(Binary(), tv, IPO(0.1, 0.001, None), kl_weight=0.0).needs_all_tokens


def test_a_divergence_that_is_nan_is_refused():
    broken = [[math.nan] * 4, *MU[1:]]
    with pytest.raises(NumericalError, match="divergence of 1 of 6 tokens"):
        run(make.loss(Binary(), TotalVariation(LOW, HIGH), DPPO_CAPPED, kl_weight=0.0), batch(broken))
