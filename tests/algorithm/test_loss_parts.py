"""Region, filter and verdict as parts of the loss: which tokens they touch, and what is seen of it."""

import math
from dataclasses import replace

import make
import pytest
import torch
from reference import logs
from six_tokens import ADVANTAGES, DPPO_CAPPED, LOW, MU, PI, REFERENCE, WEIGHT, batch, close, run

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY, Approximation, Binary, Full, TopK
from dppo_cli.algorithm.divergence import KL, TotalVariation
from dppo_cli.algorithm.filters import Band, Filter, KeepAll
from dppo_cli.algorithm.objective import DPPO, DRPO, IPO, Objective, RatioClip
from dppo_cli.algorithm.region import PerToken, PrefixBudget, Region, SequenceMean
from dppo_cli.errors import NumericalError
from dppo_cli.types import Batch, PolicyReport

TV = TotalVariation(LOW, 0.2)
RATIOS = [2.0, 0.8, 2.0, 1.5, 0.8, 0.98]


class Rows:
    """mu of the six tokens in place of a head: hidden states are row numbers."""

    def log_probs(self, hidden_NH: torch.Tensor) -> torch.Tensor:
        return logs(*MU).float()[hidden_NH[:, 0].long()]


def exact_batch() -> Batch:
    made = batch()
    rows_N1 = torch.arange(6.0)[:, None]
    report = PolicyReport(made.mu.logp_N, hidden_NH=rows_N1, head=Rows())
    return replace(made, mu=report, anchor=report)


def test_the_region_decides_what_is_outside():
    """D = (.25, .1, .075 | .1, .1, .01); tokens 0, 2 and 4, 5 move outward."""
    wide = TotalVariation(0.3, 0.3)
    assert run(make.loss(Binary(), wide, DPPO_CAPPED, 0.0))[2].keep_N.all()
    budget = PrefixBudget(w_min=1.0, budget=0.02, adaptive=False)
    _, gradient_N, seen = run(make.loss(Binary(), wide, DPPO_CAPPED, 0.0, region=budget))
    # Of the first response .35 is used up before its third token, of .3 + .04; of the second .2, of .3 + .04.
    assert seen.keep_N.tolist() == [True, True, False, True, True, True]
    close(gradient_N, [-1.6, -0.8, 0.0, 1.5, 0.8, 0.98])
    # Mean |r - 1|: (1 + .2 + 1) / 3 and (.5 + .2 + .02) / 3.
    seen = run(make.loss(Binary(), wide, DPPO_CAPPED, 0.0, region=SequenceMean(0.3)))[2]
    assert seen.keep_N.tolist() == [False, True, False, True, True, True]


def test_delta_is_that_of_the_sign_of_the_advantage():
    budget = PrefixBudget(w_min=1.0, budget=1.0, adaptive=False)  # never used up
    plain = run(make.loss(Binary(), TV, DPPO_CAPPED, 0.0))[2].keep_N
    assert plain.tolist() == [False, True, True, True, False, True]
    assert torch.equal(run(make.loss(Binary(), TV, DPPO_CAPPED, 0.0, region=budget))[2].keep_N, plain)


def test_filtered_tokens_have_no_gradient_and_no_loss():
    """Not from the reference term, either. What is seen of them stays."""
    band = Band("ratio", "token", 0.9, 1.6, False)
    reference_N = torch.tensor(REFERENCE).log()
    loss_N, gradient_N, seen = run(make.loss(Binary(), TV, DPPO_CAPPED, WEIGHT, filter=band), reference_N=reference_N)
    plain_N, plain_gradient_N, plain = run(make.loss(Binary(), TV, DPPO_CAPPED, WEIGHT), reference_N=reference_N)
    inside_N = torch.tensor([False, False, False, True, False, True])
    assert seen.filtered_N.tolist() == (~inside_N).tolist()
    assert torch.equal(loss_N, torch.where(inside_N, plain_N, 0.0))
    assert torch.equal(gradient_N, torch.where(inside_N, plain_gradient_N, 0.0))
    close(seen.log_ratio_N, [math.log(r) for r in RATIOS])
    assert torch.equal(seen.divergence_N, plain.divergence_N)
    assert seen.advantage_N.tolist() == ADVANTAGES
    assert seen.keep_N.all(), "the mask is about what the filter leaves"
    assert not plain.filtered_N.any()


@pytest.mark.parametrize("objective", [DPPO(None), DRPO(12.5), IPO(0.1, 0.001, None)])
def test_a_ratio_that_overflows_is_filtered_without_a_nan(objective: Objective):
    """exp(100) is infinite in float32, and 0 times its gradient would be NaN."""
    made = batch()
    logp_N = made.mu.logp_N.clone()
    logp_N[0] -= 100.0
    report = replace(made.mu, logp_N=logp_N)
    made = replace(made, mu=report, anchor=report)
    band = Band("ratio", "token", None, 5.0, False)
    loss_N, gradient_N, seen = run(make.loss(Binary(), TV, objective, WEIGHT, filter=band), made, torch.zeros(6))
    assert seen.filtered_N.tolist() == [True] + [False] * 5
    assert (loss_N[0].item(), gradient_N[0].item()) == (0.0, 0.0)
    assert torch.isfinite(loss_N).all()
    assert torch.isfinite(gradient_N).all()


def test_the_filter_by_divergence_sees_that_of_the_run():
    band = Band("divergence", "token", None, 0.09, False)
    seen = run(make.loss(Binary(), TV, DPPO_CAPPED, 0.0, filter=band))[2]
    assert seen.filtered_N.tolist() == [True, True, False, True, True, False]


def test_the_upper_bound_masks_what_may_be_outside():
    """min(m, p) with the sampled token alone: (.5, .5, .85, .7, .5, .5); D + it is above every threshold."""
    lower = run(make.loss(Binary(), TV, DPPO_CAPPED, 0.0))[2]
    upper = run(make.loss(Binary(), TV, DPPO_CAPPED, 0.0, verdict="upper"))[2]
    close(upper.divergence_N, [0.75, 0.6, 0.925, 0.8, 0.6, 0.51])
    assert lower.keep_N.tolist() == [False, True, True, True, False, True]
    assert upper.keep_N.tolist() == [False, True, False, True, False, False], "all that move outward"
    # Either way round it is the same tokens that the two bounds decide differently.
    assert lower.undecided_N is not None
    assert upper.undecided_N is not None
    assert lower.undecided_N.tolist() == upper.undecided_N.tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("divergence", [TV, KL(0.05, 0.05)], ids=["tv", "kl"])
@pytest.mark.parametrize("approx", [TopK(4), Full()], ids=["all_named", "full"])
def test_nothing_is_undecided_where_every_token_is_named(approx: Approximation, divergence: TotalVariation | KL):
    of = exact_batch() if approx.num_logprobs == WHOLE_VOCABULARY else batch(k=4)
    found = [run(make.loss(approx, divergence, DPPO_CAPPED, 0.0, verdict=v), of)[2] for v in ("lower", "upper")]
    for seen in found:
        assert seen.undecided_N is not None
        assert not seen.undecided_N.any()
    torch.testing.assert_close(found[0].divergence_N, found[1].divergence_N, atol=2e-6, rtol=0)
    assert torch.equal(found[0].keep_N, found[1].keep_N)


def test_more_named_tokens_leave_less_undecided():
    """Of exact D (.25, .., .1 | .., .1, .085) only tokens 0 and 4, 5 are outside."""
    shares = []
    for k in (1, 2, 3):
        seen = run(make.loss(TopK(k), TV, DPPO_CAPPED, 0.0), batch(k=k))[2]
        assert seen.undecided_N is not None
        shares.append(seen.undecided_N.sum().item())
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1]
    exact = [0.5 * sum(abs(m - p) for m, p in zip(mu, pi, strict=True)) for mu, pi in zip(MU, PI, strict=True)]
    full = run(make.loss(Full(), TV, DPPO_CAPPED, 0.0), exact_batch())[2]
    close(full.divergence_N, exact)


def test_where_the_divergence_decides_nothing_nothing_is_undecided():
    assert run(make.loss(Binary(), TV, RatioClip(0.2, 0.2, None), 0.0))[2].undecided_N is None
    assert run(make.loss(Binary(), TV, DPPO_CAPPED, 0.0, region=SequenceMean(0.3)))[2].undecided_N is None


def test_what_the_filter_decides_by_the_divergence_counts_as_undecided():
    """No token by the lower bound of D, all by the upper one; tokens 0 and 4 have no gradient either way."""
    band = Band("divergence", "token", None, 0.3, False)
    for verdict in ("lower", "upper"):
        seen = run(make.loss(Binary(), TV, DPPO_CAPPED, 0.0, filter=band, verdict=verdict))[2]
        assert seen.filtered_N.tolist() == [verdict == "upper"] * 6
        assert seen.undecided_N is not None
        assert seen.undecided_N.tolist() == [False, True, True, True, False, True]
    # What another filter drops is decided.
    ratios = Band("ratio", "token", 0.9, 1.6, False)
    seen = run(make.loss(Binary(), TV, DPPO_CAPPED, 0.0, filter=ratios))[2]
    assert seen.undecided_N is not None
    assert seen.undecided_N.tolist() == [False] * 5 + [True]


@pytest.mark.parametrize("region", [PerToken(), SequenceMean(0.3), PrefixBudget(0.8, 0.02, True)])
@pytest.mark.parametrize(
    "filter",
    [KeepAll(), Band("ratio", "token", 0.9, 1.6, False), Band("divergence", "sequence_mean", None, 1.0, False)],
)
def test_a_divergence_that_is_nan_is_neither_kept_nor_filtered(region: Region, filter: Filter):
    """The sampled tokens' own log-probs are sound."""
    made = batch()
    assert made.mu.topk_logp_NK is not None
    topk_logp_NK = made.mu.topk_logp_NK.clone()
    topk_logp_NK[0, 0] = math.nan
    made = replace(made, anchor=replace(made.mu, topk_logp_NK=topk_logp_NK))
    with pytest.raises(NumericalError, match="divergence of 1 of 6 tokens is NaN"):
        run(make.loss(TopK(2), TV, DPPO_CAPPED, 0.0, region=region, filter=filter), made)
