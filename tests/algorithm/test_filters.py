"""Off-policy filters: worked examples of each published rule, and what a filter must never do."""

import math
from typing import Any

import pytest
import torch
from helpers import built_of
from reference import make_tokens

from dppo_cli.algorithm.filters import AllOf, Band, Filter, KeepAll
from dppo_cli.algorithm.tokens import Tokens
from dppo_cli.errors import ConfigError, NumericalError


def of_ratios(ratio: list[float], advantage: float = 1.0, sequence: list[int] | None = None) -> Tokens:
    mu = 0.1
    return make_tokens(
        [mu] * len(ratio),
        [mu * r for r in ratio],
        [advantage] * len(ratio),
        sequence=sequence,
        dtype=torch.float32,
    )


def kept(filter: Filter, tokens: Tokens) -> list[int]:
    return filter(tokens).int().tolist()


def choice(*words: str) -> Filter:
    """What the YAML files make of it."""
    return built_of(*(f"filter{word}" for word in words)).filter


def test_icepop_drops_tokens_by_their_ratio():
    assert kept(choice("=icepop"), of_ratios([0.4, 0.501, 4.999, 5.1])) == [0, 1, 1, 0]
    assert kept(choice("=icepop"), of_ratios([0.4, 5.1], advantage=-1.0)) == [0, 0], "whatever the advantage"


def test_kpop_judges_by_the_probability_that_moved():
    """KL of {token, rest}: .116 and .154 for (.9, .7); .003 and .006 for (.001, .006)."""
    tokens = make_tokens([0.9, 0.001], [0.7, 0.006], [1.0, 1.0], dtype=torch.float32)
    assert kept(choice("=kpop", ".high=0.1"), tokens) == [0, 1]
    assert kept(choice("=icepop"), tokens) == [1, 0]
    # Either way round is enough: KL(mu, pi) = .116 is below .13, KL(pi, mu) = .154 above.
    assert kept(choice("=kpop", ".high=0.13"), tokens) == [0, 1]
    assert kept(choice("=kpop", ".high=0.16"), tokens) == [1, 1]


def test_the_geometric_mean_and_the_product():
    up = of_ratios([math.exp(x) for x in (0.02, -0.01, 0.02)])  # mean log r = .01, r = 1.01005; product 1.0305
    assert kept(choice("=geometric"), up) == [0, 0, 0]
    assert kept(choice("=geometric", ".high=1.02"), up) == [1, 1, 1]
    assert kept(choice("=sequence_ratio", ".high=1.03"), up) == [0, 0, 0]
    assert kept(choice("=sequence_ratio", ".high=1.04"), up) == [1, 1, 1]
    away = of_ratios([math.e, 1 / math.e])  # the mean log r is 0, that of (log r)^2 / 2 is 1/2
    assert kept(choice("=geometric"), away) == [1, 1]
    assert kept(Band("k2", "sequence_mean", None, 0.4, False), away) == [0, 0]
    assert kept(Band("k2", "sequence_mean", None, 0.6, False), away) == [1, 1]


def test_responses_are_judged_one_by_one():
    tokens = of_ratios([1.3, 1.0, 0.8, 1.3], sequence=[0, 1, 0, 1])  # means 1.02 and 1.14
    assert kept(choice("=geometric", ".high=1.05"), tokens) == [1, 0, 1, 0]


def test_k3():
    """r - 1 - log r of (1.2, 0.9) is (.01768, .00536), mean .0115."""
    assert kept(choice("=k3"), of_ratios([1.2, 0.9])) == [0, 0]
    assert kept(choice("=k3", ".high=0.012"), of_ratios([1.2, 0.9])) == [1, 1]
    assert kept(Band("k3", "token", None, 0.01, False), of_ratios([1.2, 0.9])) == [0, 1]


def test_a_veto_drops_the_whole_response():
    assert kept(choice("=veto"), of_ratios([1.0, 5e-5, 1.0, 1.0], sequence=[0, 0, 1, 1])) == [0, 0, 1, 1]
    assert kept(choice("=veto"), of_ratios([1.0, 2e-4])) == [1, 1]


def test_opsm_drops_bad_responses_only():
    """Mean log(mu/pi) = .3 > .2."""
    less_likely = [math.exp(-0.4), math.exp(-0.2)]
    words = ("=opsm", f".low={math.exp(-0.2):.6f}")
    assert kept(choice(*words), of_ratios(less_likely, advantage=-1.0)) == [0, 0]
    assert kept(choice(*words), of_ratios(less_likely, advantage=1.0)) == [1, 1]
    assert kept(choice(*words), of_ratios([1.3, 1.3], advantage=-1.0)) == [1, 1]


def test_trm_looks_at_the_largest_and_at_the_mean_divergence():
    def tokens(*divergence: float) -> Tokens:
        return make_tokens([0.5] * 3, [0.5] * 3, [1.0] * 3, list(divergence), dtype=torch.float32)

    largest = choice("=trm", ".members.max.high=0.05", ".members.mean.high=1")
    assert kept(largest, tokens(0.01, 0.06, 0.0)) == [0, 0, 0]
    assert kept(largest, tokens(0.01, 0.04, 0.0)) == [1, 1, 1]
    assert kept(choice("=trm"), tokens(0.002, 0.0005, 0.0)) == [1, 1, 1]
    assert kept(choice("=trm"), tokens(0.006, 0.001, 0.0)) == [0, 0, 0], "the mean is above 0.002"


def test_all_of_keeps_what_every_member_keeps():
    both = choice("=all_of", ".members.band=icepop", ".members.rare=veto", ".members.band.high=2")
    assert kept(both, of_ratios([1.0, 3.0, 1.0, 5e-5], sequence=[0, 0, 1, 1])) == [1, 0, 0, 0]
    assert both.splits_responses
    assert not choice("=trm").splits_responses
    with pytest.raises(ConfigError, match=r"filter=all_of has no members: add filter\.members\.NAME=CHOICE"):
        AllOf({})


def test_both_bounds_are_kept():
    tokens = make_tokens([0.5] * 4, [0.5] * 4, [1.0] * 4, [0.125, 0.25, 0.5, 1.0], dtype=torch.float32)
    assert kept(Band("divergence", "token", 0.25, 0.5, False), tokens) == [0, 1, 1, 0]


def test_negative_only_leaves_tokens_without_advantage():
    tokens = make_tokens([0.5] * 3, [0.5] * 3, [-1.0, 0.0, 1.0], [0.9] * 3, dtype=torch.float32)
    assert kept(Band("divergence", "token", None, 0.5, True), tokens) == [0, 1, 1]


def test_no_filter_keeps_everything():
    assert isinstance(choice("=none"), KeepAll)
    assert kept(KeepAll(), of_ratios([1e-9, 9.0])) == [1, 1]


@pytest.mark.parametrize("statistic", ["ratio", "k2", "k3", "two_way_kl"])
@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_broken_log_probs_are_refused_and_not_dropped(statistic: str, broken: float):
    tokens = of_ratios([1.0, 1.0])
    tokens.logp_mu_N[1] = -broken
    with pytest.raises(NumericalError, match="1 of 2 tokens is NaN or infinite") as found:
        Band(statistic, "sequence_mean", None, 1.0, False)(tokens)
    assert found.value.tokens == [1]


def test_a_token_that_pi_excludes_is_dropped():
    """log r = -inf is a ratio of 0, not an error."""
    tokens = of_ratios([0.0, 1.0])
    assert kept(Band("ratio", "token", 0.5, None, False), tokens) == [0, 1]
    assert kept(Band("k3", "sequence_mean", None, 0.5, False), tokens) == [0, 0]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (("ratio", "token", None, None), "filter.low and filter.high are both null"),
        (("ratio", "token", 0.0, None), "filter.low=0 must be positive"),
        (("k3", "token", None, -1.0), "filter.high=-1 must be at least 0"),
        (("ratio", "token", 2.0, 1.0), "filter.low=2 is above filter.high=1"),
        (("k4", "token", None, 1.0), "filter.statistic=k4"),
        (("k3", "sequence", None, 1.0), "filter.scope=sequence"),
    ],
)
def test_values_out_of_range_are_refused(values: Any, text: str):
    with pytest.raises(ConfigError) as found:
        Band(*values, False)
    assert text in str(found.value)
