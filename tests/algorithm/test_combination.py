"""Which parts of a loss are refused together, and which are told to be unusual."""

from dataclasses import dataclass

import make
import pytest
from helpers import built_of

from dppo_cli.algorithm.approx import Binary, Full
from dppo_cli.algorithm.combination import check_combination
from dppo_cli.algorithm.objective import DPPO
from dppo_cli.algorithm.region import PrefixBudget
from dppo_cli.errors import ConfigError


@dataclass(frozen=True)
class Hellinger:
    """One of the user's own, known from below alone."""

    delta_low: float = 0.1
    delta_high: float = 0.1

    def __call__(self, log_mu_NS, log_pi_NS):
        return 1 - (0.5 * (log_mu_NS + log_pi_NS)).exp().sum(-1)


@pytest.mark.parametrize("objective", ["ppo", "pg_is", "cispo", "gspo", "ipo", "minimal_mask", "drpo"])
@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (("region=prefix_budget",), "use objective=dppo, or region=token"),
        (("region=sequence_mean",), "use objective=dppo, or region=token"),
        (("verdict=upper", "approx=topk"), "use objective=dppo with region=token or prefix_budget, or verdict=lower"),
    ],
)
def test_regions_need_an_objective_that_masks_by_them(objective: str, words: tuple[str, ...], advice: str):
    with pytest.raises(ConfigError, match=advice):
        built_of(f"objective={objective}", *words)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("region=prefix_budget", "anchor=recompute"), "anchor=recompute is an ablation"),
        (("region=sequence_mean", "anchor=recompute"), "use region=token, or anchor=rollout"),
        (("region=prefix_budget", "divergence=kl"), r"region.budget=0.02 is on the scale of TV.*region.budget=0.002"),
        (("objective=gspo", "filter=icepop"), "filter=geometric"),
        (("objective=gspo", "filter=all_of", "filter.members.x=kpop"), "filter=geometric"),
        (("verdict=both",), "verdict=both"),
        (("verdict=upper", "region=sequence_mean"), "or verdict=lower"),
        (("verdict=upper", "region=prefix_budget"), "add region.adaptive=false"),
        (("anchor=recompute", "filter=trm"), "says nothing about mu"),
    ],
)
def test_what_does_not_go_together_is_refused(words: tuple[str, ...], text: str):
    with pytest.raises(ConfigError, match=text):
        built_of(*words)


def test_what_goes_together_is_not_refused():
    assert built_of("region=prefix_budget", "divergence=kl", "region.budget=0.002").region == PrefixBudget(
        0.8, 0.002, True
    )
    assert not built_of("objective=gspo", "filter=geometric").loss.compares_divergence
    assert built_of("anchor=recompute", "filter=icepop").filter.splits_responses
    words = ("approx=full", "region=prefix_budget", "region.adaptive=false", "filter=trm")
    assert built_of("verdict=upper", *words).loss.compares_divergence


def test_an_upper_verdict_needs_a_divergence_with_one():
    loss = make.loss(Binary(), Hellinger(), DPPO(5.0), 0.0, verdict="upper")
    with pytest.raises(ConfigError, match="verdict=upper needs a divergence with an upper bound"):
        check_combination(loss, "rollout")
    check_combination(make.loss(Full(), Hellinger(), DPPO(5.0), 0.0, verdict="upper"), "rollout")
    check_combination(make.loss(Binary(), Hellinger(), DPPO(5.0), 0.0), "rollout")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("verdict=upper",), "verdict=upper with approx=binary masks every token that moves outward"),
        (("filter=sequence_ratio", "sampling.max_new_tokens=500"), "the product of up to 500 ratios"),
        (("filter=kpop", "filter.high=0.05", "divergence=kl"), "the trust region, with thresholds of 0.05 and 0.05,"),
        (("filter=band", "filter.statistic=divergence", "filter.high=0.1"), "a divergence above 0.1, so the trust"),
        (("filter=trm", "filter.members.max.high=0.5"), "a divergence above 0.002, which is a bound for KL"),
        (("filter=all_of", "filter.members.a=kpop", "filter.members.a.high=0.01", "divergence=kl"), "never masks one"),
    ],
)
def test_unusual_combinations_are_told(words: tuple[str, ...], text: str):
    (told,) = built_of(*words).unusual()
    assert text in told


def test_usual_combinations_are_not():
    for words in (
        ("verdict=upper", "approx=topk"),
        ("filter=sequence_ratio", "sampling.max_new_tokens=100"),
        ("filter=kpop", "filter.high=0.1", "divergence=kl"),
        ("filter=kpop", "filter.high=0.05", "divergence=tv"),
        # The region can mask what this filter leaves.
        ("filter=kpop", "filter.high=0.05", "divergence=kl", "filter.negative_only=true"),
        ("filter=kpop", "filter.high=0.05", "divergence=kl", "anchor=recompute"),
        ("filter=kpop", "filter.high=0.05", "divergence=kl", "region=prefix_budget", "region.budget=0.002"),
        ("filter=band", "filter.statistic=divergence", "filter.high=0.2"),
        ("filter=trm", "divergence=kl", "approx=full"),
    ):
        assert built_of(*words).unusual() == []
