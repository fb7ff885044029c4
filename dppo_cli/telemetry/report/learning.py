"""Figures of accuracy and reward, the two that are noisy and say whether a run learns."""

from collections.abc import Mapping, Sequence
from typing import Any

from dppo_cli.telemetry.report.curves import (
    FAINT,
    FIFTH,
    FOURTH,
    MAIN,
    SECOND,
    THIRD,
    Event,
    Figure,
    band,
    column,
    has,
    line,
    plot,
    running_mean,
)
from dppo_cli.telemetry.report.data import HELD_OUT, RunData, number, section, wilson

SMOOTHED_FROM = 60
"""Steps from which on noisy curves get a running mean instead of an interval."""

Rows = Sequence[Mapping[str, Any]]


def evaluations(run: RunData, name: str = HELD_OUT) -> list[tuple[int, float, float, float]]:
    """Step, accuracy and 95% interval of every evaluation on a set.

    Those in between left no interval in the files: it is Wilson's, counting problems.
    """
    measured = run.evaluations.get(name, {})
    problems = next((m["problems"] for m in measured.values() if m and m.get("problems")), None)
    found: dict[int, tuple[float, Any]] = {}
    if name == HELD_OUT:
        steps = [row["step"] for row in run.metrics]
        in_between = zip(steps, column(run.metrics, "eval_accuracy"), strict=True)
        found = {step: (value, None) for step, value in in_between if value is not None}
    last = number((run.summary or {}).get("steps"))
    for side, step in (("before", 0), ("after", run.steps if last is None else int(last))):
        figures = measured.get(side) or {}
        if (value := number(figures.get("accuracy"))) is not None:
            found[step] = (value, figures.get("interval"))
    points = []
    for step, (value, interval) in sorted(found.items()):
        low, high = interval or (wilson(value, int(problems)) if problems else (value, value))
        points.append((step, value, float(low), float(high)))
    return points


def accuracy(run: RunData, events: Sequence[Event]) -> Figure | None:
    rows, form = run.metrics, ".1%"
    caption = "Share of right samples; the bars are 95% intervals"
    traces = []
    if has(rows, "accuracy"):
        if len(rows) < SMOOTHED_FROM:
            shares = zip(column(rows, "accuracy"), column(rows, "sampled_groups"), strict=True)
            ends = [wilson(a, int(n)) if a is not None and n else (None, None) for a, n in shares]
            traces += band(steps_of(rows), [e[0] for e in ends], [e[1] for e in ends])
            caption += ", and so is the area, which counts problems and not samples"
        traces += noisy("training samples", rows, "accuracy", SECOND, form)
    for i, name in enumerate(run.evaluations or [HELD_OUT]):
        points = evaluations(run, name)
        if not points:
            continue
        colour = (MAIN, THIRD, FOURTH, FIFTH)[i % 4]
        x, y, low, high = (list(c) for c in zip(*points, strict=True))
        bars = {
            "symmetric": False,
            "array": [b - a for a, b in zip(y, high, strict=True)],
            "arrayminus": [a - b for a, b in zip(y, low, strict=True)],
            "thickness": 1.4,
            "width": 4,
        }
        label = "held-out problems" if name == HELD_OUT else name
        texts = [f"{a:.1%} (95%: {b:.1%} to {c:.1%})" for a, b, c in zip(y, low, high, strict=True)]
        marks = {"mode": "lines+markers", "marker": {"size": 7, "color": colour}}
        shown = {"text": texts, "hovertemplate": "%{text}"}
        traces.append({**line(label, x, y, colour, form, error_y=bars, dash="dot", width=1.2), **marks, **shown})
    if not traces:
        return None
    return Figure("accuracy", "Accuracy", f"{caption}.", plot(traces, ".0%", events, rangemode="tozero"))


def reward(rows: Rows, events: Sequence[Event]) -> Figure | None:
    """With the members of a mixture."""
    traces = noisy("reward", rows, "reward", SECOND, ".3f") if has(rows, "reward") else []
    names = dict.fromkeys(name for row in rows for name in section(row, "reward_parts"))
    for i, name in enumerate(names):
        y = column(rows, f"reward_parts.{name}")
        colour = (MAIN, THIRD, FOURTH, FIFTH)[i % 4]
        traces.append(line(name, steps_of(rows), y, colour, ".3f", width=1.2))
    if not traces:
        return None
    return Figure("reward", "Reward", "Mean over the step's samples.", plot(traces, "~g", events))


def noisy(name: str, rows: Rows, key: str, colour: str, form: str) -> list[dict[str, Any]]:
    """A curve; of a long run, thin, with its running mean."""
    x, y = steps_of(rows), column(rows, key)
    if len(rows) < SMOOTHED_FROM:
        return [line(name, x, y, colour, form)]
    width = max(5, len(rows) // 30)
    return [
        line(name, x, y, FAINT, form, width=1),
        line(f"mean of {width} steps", x, running_mean(y, width), colour, form, width=2.2),
    ]


def steps_of(rows: Rows) -> list[int]:
    return [row["step"] for row in rows]
