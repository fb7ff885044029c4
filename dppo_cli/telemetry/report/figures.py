"""The figures of one run, in three groups: does it learn, what does the trust region do, what does it cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dppo_cli.telemetry.report.curves import (
    FAINT,
    FIFTH,
    FOURTH,
    MAIN,
    NEGATIVE,
    POSITIVE,
    QUANTILES,
    SECOND,
    THIRD,
    Event,
    Figure,
    column,
    limit,
    line,
    log_axis,
    plot,
    share_axis,
)
from dppo_cli.telemetry.report.data import RunData, section
from dppo_cli.telemetry.report.learning import Rows, accuracy, reward, steps_of

PHASES = ("rollout", "reward", "update", "sync", "eval", "checkpoint", "anchor")
PHASE_COLOURS = (MAIN, SECOND, THIRD, FOURTH, FIFTH, FAINT)
NOT_PHASES = ("total", "rollout_tokens_per_second", "tokens_per_second")


def run_figures(run: RunData, events: Sequence[Event]) -> dict[str, list[Figure]]:
    """Figures by the heading of their group. One that a run has no numbers for is left out."""
    rows = run.metrics
    if not rows:
        return {}
    groups = {
        "Learning": [accuracy(run, events), reward(rows, events), entropy(rows, events), lengths(rows, events)],
        "Trust region": [
            divergence(run, events),
            masked(rows, events),
            shift(rows, events),
            ratio(rows, events),
            reference(rows, events),
        ],
        "Optimizer and cost": [
            gradient(rows, events),
            learning_rate(rows, events),
            samples(rows, events),
            speed(rows, events),
            seconds(rows, events),
            memory(rows, events),
        ],
    }
    found = {name: [figure for figure in figures if figure is not None] for name, figures in groups.items()}
    return {name: figures for name, figures in found.items() if figures}


def entropy(rows: Rows, events: Sequence[Event]) -> Figure | None:
    caption = "Of the policy at sampled tokens, nats. A fall to 0 means that the samples of a problem are all alike."
    return _lines(
        "entropy", "Entropy", caption, rows, {"entropy": ("entropy", MAIN)}, ".3f", events, rangemode="tozero"
    )


def lengths(rows: Rows, events: Sequence[Event]) -> Figure | None:
    curves = {
        "response_tokens": ("response, mean", MAIN),
        "response_tokens_max": ("response, longest", THIRD),
        "prompt_tokens": ("prompt, mean", FAINT),
    }
    if any(column(rows, "reply_tokens")):
        curves["reply_tokens"] = ("of these said by the environment, mean", QUANTILES[1])
    return _lines("lengths", "Lengths", "Tokens of a sample.", rows, curves, ".4~g", events, rangemode="tozero")


def divergence(run: RunData, events: Sequence[Event]) -> Figure | None:
    curves = {
        "divergence_p100": ("largest", QUANTILES[3]),
        "divergence_p99": ("99%", QUANTILES[2]),
        "divergence_p90": ("90%", QUANTILES[1]),
        "divergence_p50": ("median", QUANTILES[0]),
    }
    of = "the upper bound of the divergence" if run.config.get("verdict") == "upper" else "the divergence"
    caption = f"Quantiles over tokens of {of} of pi from mu"
    caption += ", and the threshold delta: tokens above it may be masked." if run.delta("high") is not None else "."
    figure = _lines("divergence", "Divergence against delta", caption, run.metrics, curves, ".2~e", events, log="~g")
    if figure is None:
        return None
    low, high = run.delta("low"), run.delta("high")
    limits = {"delta": high} if low == high else {"delta, A>0": high, "delta, A<0": low}
    shapes = [limit(value, f"{name} = {value:g}") for name, value in limits.items() if value]
    figure.plot["layout"]["shapes"] = [*figure.plot["layout"].get("shapes", ()), *shapes]
    # The median is often a rounding error; ten decades of it would leave no room for the rest.
    values = [*(v for key in curves for v in column(run.metrics, key)), *limits.values()]
    top = max((v for v in values if v and v > 0), default=1.0)
    exponent = math.ceil(math.log10(top))
    figure.plot["layout"]["yaxis"] |= {"range": [exponent - 4, exponent + 0.3], "tickformat": "~g", "dtick": 1}
    return figure


def masked(rows: Rows, events: Sequence[Event]) -> Figure | None:
    curves = {"masked_positive": ("A > 0", POSITIVE), "masked_negative": ("A < 0", NEGATIVE)}
    caption = (
        "Share of the tokens of each sign of the advantage that got no gradient, because pi had gone too far already."
    )
    if any(column(rows, "filtered")):
        curves["filtered"] = ("filtered", THIRD)
        caption += " Filtered: the share of tokens with A ≠ 0 that the off-policy filter dropped."
    axis = share_axis([column(rows, key) for key in curves])
    return _lines("masked", "Masked tokens", caption, rows, curves, ".2%", events, **axis)


def shift(rows: Rows, events: Sequence[Event]) -> Figure | None:
    curves = {
        "shift_mean": ("after updates, mean", MAIN),
        "shift_max": ("after updates, largest", THIRD),
        "mismatch_mean": ("before updates, mean", SECOND),
    }
    caption = (
        "Before a step's first update pi should equal mu: what is left is the disagreement of sampler and trainer. "
        "The rest is what the updates moved."
    )
    return _lines("shift", "|pi−mu|", caption, rows, curves, ".2~e", events, log="")


def ratio(rows: Rows, events: Sequence[Event]) -> Figure | None:
    curves = {
        "ratio_p100": ("largest", QUANTILES[3]),
        "ratio_p99": ("99%", QUANTILES[2]),
        "ratio_p50": ("median", QUANTILES[0]),
        "ratio_p1": ("1%", QUANTILES[1]),
    }
    return _lines("ratio", "Ratio pi / mu", "Quantiles over tokens.", rows, curves, ".3f", events, log="~g")


def reference(rows: Rows, events: Sequence[Event]) -> Figure | None:
    """None without a reference term, where all values are 0."""
    if not any(column(rows, "reference_kl")):
        return None
    caption = "Mean of log pi - log of the model before training, at sampled tokens, nats: how far the policy has gone."
    curves = {"reference_kl": ("log pi - log reference", MAIN)}
    return _lines("reference", "KL to the reference", caption, rows, curves, ".3~g", events)


def learning_rate(rows: Rows, events: Sequence[Event]) -> Figure | None:
    caption = "Of the step's last update."
    return _lines(
        "lr", "Learning rate", caption, rows, {"lr": ("lr", MAIN)}, ".3~g", events, rangemode="tozero", tickformat="~g"
    )


def gradient(rows: Rows, events: Sequence[Event]) -> Figure | None:
    caption = "Norm before clipping, mean over the step's updates."
    curves = {"gradient_norm": ("gradient norm", MAIN)}
    return _lines("gradient", "Gradient norm", caption, rows, curves, ".3~g", events, rangemode="tozero")


def samples(rows: Rows, events: Sequence[Event]) -> Figure | None:
    curves = {
        "finished": ("ended by themselves", MAIN),
        "equal_groups": ("problems whose samples are alike", SECOND),
        "unjudged": ("not judged", FIFTH),
        "skipped": ("left out of updates", THIRD),
        "padding": ("padding, of positions", FAINT),
    }
    caption = "Shares. A problem whose samples all get the same reward teaches nothing."
    figure = _lines(
        "samples",
        "What became of the samples",
        caption,
        rows,
        curves,
        ".1%",
        events,
        range=[-0.02, 1.05],
        tickformat=".0%",
    )
    return _dotted(figure, "left out of updates")  # Often the same as the samples that are alike.


def speed(rows: Rows, events: Sequence[Event]) -> Figure | None:
    curves = {
        "time.tokens_per_second": ("whole step", MAIN),
        "time.rollout_tokens_per_second": ("sampling alone", THIRD),
    }
    caption = "Sampled tokens per second."
    return _lines(
        "speed", "Tokens per second", caption, rows, curves, ".3~s", events, rangemode="tozero", tickformat="~s"
    )


def seconds(rows: Rows, events: Sequence[Event]) -> Figure | None:
    inside = {name for row in rows for name in section(dict(row), "time")} - set(NOT_PHASES)
    names = sorted(inside, key=lambda name: (PHASES.index(name) if name in PHASES else len(PHASES), name))
    traces = []
    for i, name in enumerate(names):
        colour = PHASE_COLOURS[min(i, len(PHASE_COLOURS) - 1)]
        y = [value or 0.0 for value in column(rows, f"time.{name}")]
        traces.append(line(name, steps_of(rows), y, colour, ".2f", stackgroup="seconds", width=0.8))
    if not traces:
        return None
    return Figure("seconds", "Seconds by phase", "Stacked: their sum is a step.", plot(traces, "~g", events))


def memory(rows: Rows, events: Sequence[Event]) -> Figure | None:
    curves = {
        "memory.device_peak_gib": ("GPU, peak of the step", MAIN),
        "memory.process_gib": ("process, after the step", SECOND),
        "memory.process_peak_gib": ("process, peak so far", THIRD),
    }
    caption = "GiB. What the process holds should level off; a GPU's peak depends on the longest samples of a step."
    figure = _lines("memory", "Memory", caption, rows, curves, ".2f", events, rangemode="tozero")
    return _dotted(figure, "process, peak so far")


def _dotted(figure: Figure | None, name: str) -> Figure | None:
    """With one of the lines dotted, because it may lie on another."""
    for trace in figure.plot["data"] if figure is not None else ():
        if trace["name"] == name:
            trace["line"]["dash"] = "dot"
    return figure


def _lines(
    name: str,
    title: str,
    caption: str,
    rows: Rows,
    curves: Mapping[str, tuple[str, str]],
    form: str,
    events: Sequence[Event],
    log: str | None = None,
    **axis: Any,
) -> Figure | None:
    """One figure with a line for each key that has values; None if none has. `log`: of the ticks of a log axis."""
    found = [(label, colour, column(rows, key)) for key, (label, colour) in curves.items()]
    if log is not None:
        # There is no logarithm of 0.
        found = [(label, colour, [v if v and v > 0 else None for v in y]) for label, colour, y in found]
        axis = {**log_axis([y for _, _, y in found], log), **axis}
    found = [row for row in found if any(value is not None for value in row[2])]
    traces = [line(label, steps_of(rows), y, colour, form) for label, colour, y in found]
    tickformat = axis.pop("tickformat", form if form.endswith("%") else "~g")
    return Figure(name, title, caption, plot(traces, tickformat, events, **axis)) if traces else None
