"""Which parts of a loss go together: all but these."""

from collections.abc import Iterator

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY, Binary
from dppo_cli.algorithm.divergence import KL, Bounded
from dppo_cli.algorithm.filters import AllOf, Band, Filter
from dppo_cli.algorithm.loss import Loss, uses_region
from dppo_cli.algorithm.objective import GSPO
from dppo_cli.algorithm.region import PerToken, PrefixBudget
from dppo_cli.config.checks import check_choice
from dppo_cli.errors import ConfigError

LARGEST_KL_BUDGET = 0.01
"""Nats. Five times that of the publication; its budget for TV is 0.02."""
LONG = 100
"""Tokens beyond which the product of a response's ratios is nearly always far from 1."""


def check_combination(loss: Loss, anchor: str) -> None:
    """Raise ConfigError for what does not go together. `anchor`: what the region is centred on."""
    check_choice("verdict", loss.verdict, ("lower", "upper"))
    exact = loss.approx.num_logprobs == WHOLE_VOCABULARY
    if loss.verdict == "upper" and not exact and not isinstance(loss.divergence, Bounded):
        raise ConfigError("verdict=upper needs a divergence with an upper bound (a method `slack`); use verdict=lower")
    plain = isinstance(loss.region, PerToken)
    if not plain and not uses_region(loss.objective):
        raise ConfigError("region is for an objective that masks by it: use objective=dppo, or region=token")
    if loss.verdict == "upper" and not loss.compares_divergence:
        raise ConfigError(
            "verdict=upper is for a trust region of the divergence: use objective=dppo with region=token or "
            "prefix_budget, or verdict=lower"
        )
    if loss.verdict == "upper" and isinstance(loss.region, PrefixBudget) and loss.region.adaptive:
        raise ConfigError(
            "region.adaptive=true gives a response of larger divergence a larger budget, so verdict=upper would keep "
            "what the exact divergence masks: add region.adaptive=false"
        )
    if anchor == "recompute" and any(band.statistic == "divergence" for band in _bands(loss.filter)):
        raise ConfigError(
            "with anchor=recompute the divergence is that from the trainer's own policy, which says nothing about mu: "
            "use another filter, such as filter=k3"
        )
    if anchor == "recompute" and not plain:
        raise ConfigError(
            "anchor=recompute is an ablation of the trust region of single tokens: use region=token, or anchor=rollout"
        )
    budget = loss.region.budget if isinstance(loss.region, PrefixBudget) else 0.0
    if isinstance(loss.divergence, KL) and budget > LARGEST_KL_BUDGET:
        raise ConfigError(
            f"region.budget={budget:g} is on the scale of TV; with divergence=kl the publication takes 0.002 nats: add "
            "region.budget=0.002"
        )
    if isinstance(loss.objective, GSPO) and loss.filter.splits_responses:
        raise ConfigError(
            "this filter drops single tokens, and objective=gspo has one ratio for a whole response: use a filter of "
            "whole responses, such as filter=geometric"
        )


def unusual(loss: Loss, anchor: str, max_new_tokens: int) -> Iterator[str]:
    """What is allowed but unusual, in words. `max_new_tokens`: of a response."""
    deltas = {key: getattr(loss.divergence, key) for key in ("delta_low", "delta_high")}
    usual = getattr(loss.divergence, "usual_delta", None)
    for key, delta in deltas.items():
        if usual and not usual[0] <= delta <= usual[1]:
            yield (
                f"divergence.{key}={delta} lies outside {usual[0]:g} to {usual[1]:g}, where this divergence worked "
                "in the paper; thresholds of TV and KL are on different scales"
            )
    binary = isinstance(loss.approx, Binary)
    if loss.verdict == "upper" and binary:
        yield (
            "verdict=upper with approx=binary masks every token that moves outward, unless it was nearly certain: one "
            "log-prob says little about the other tokens; approx=topk says more"
        )
    is_kl = isinstance(loss.divergence, KL)
    masks_beyond_delta = uses_region(loss.objective) and isinstance(loss.region, PerToken) and anchor == "rollout"
    for band in _bands(loss.filter):
        if (band.statistic, band.scope) == ("ratio", "sequence_sum") and max_new_tokens > LONG:
            yield (
                f"the product of up to {max_new_tokens} ratios is nearly always far from 1, so this filter drops most "
                "long responses; filter=geometric takes their mean"
            )
        if band.high is None:
            continue
        if band.statistic == "divergence" and band.high <= LARGEST_KL_BUDGET and not is_kl:
            yield (
                f"this filter drops what has a divergence above {band.high:g}, which is a bound for KL; this run's "
                "divergence is another, and its scale, too: use divergence=kl"
            )
        same = band.statistic == "divergence" or (band.statistic == "two_way_kl" and binary and is_kl)
        whole = band.scope == "token" and not band.negative_only and loss.verdict == "lower"
        if masks_beyond_delta and same and whole and band.high <= min(deltas.values()):
            yield (
                f"this filter drops every token with a divergence above {band.high:g}, so the trust region, with "
                f"thresholds of {deltas['delta_low']:g} and {deltas['delta_high']:g}, never masks one"
            )


def _bands(filter: Filter) -> Iterator[Band]:
    if isinstance(filter, AllOf):
        for member in filter.members.values():
            yield from _bands(member)
    elif isinstance(filter, Band):
        yield filter
