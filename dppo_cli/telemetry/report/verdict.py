"""What a researcher asks first: did it learn, does the trust region do its job, is anything wrong."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dppo_cli.telemetry.report.curves import Event, column
from dppo_cli.telemetry.report.data import HELD_OUT, RunData, number, section
from dppo_cli.telemetry.table import percent, points, with_interval

QUIET = 30
"""Steps at the end without a masked token: the policy does not reach the edge of its trust region."""
BUSY = 0.20
"""Share of masked tokens of one sign above which the region is probably too narrow."""


@dataclass(frozen=True)
class Verdict:
    """`tone`: good, neutral or bad, which the page shows as a symbol, too.

    `shares`: what the page draws as bars: name, share, low and high end.
    """

    question: str
    answer: str
    tone: str
    lines: list[str] = field(default_factory=list)
    shares: list[tuple[str, float, float, float]] = field(default_factory=list)


def verdicts(run: RunData, events: Sequence[Event]) -> list[Verdict]:
    return [learned(run), trust_region(run), warnings(run, events)]


def learned(run: RunData) -> Verdict:
    """Of the held-out problems, or of the first set if there are others only."""
    question = "Did accuracy go up?"
    sets = run.evaluations
    if not sets:
        return Verdict(question, "Not measured", "neutral", _of_training(run) or ["The run has no evaluation yet."])
    name = HELD_OUT if HELD_OUT in sets else next(iter(sets))
    lines = [_in_words(measured, "" if label == name else f"{label}: ") for label, measured in sets.items()]
    shares = [(side, *span) for side in ("before", "after") if (span := _share_of(sets[name], side))]
    found = sets[name].get("difference") or {}
    mean, interval = number(found.get("mean")), found.get("interval")
    if mean is None:
        if len(shares) < 2:
            return Verdict(question, "Not known before the run ends", "neutral", lines + _of_training(run), shares)
        lines.append("This run kept no paired difference, so how sure this is cannot be said.")
        return Verdict(question, f"{_points(shares[1][1] - shares[0][1])}, without interval", "neutral", lines, shares)
    if interval:
        ends = f"{100 * interval[0]:+.1f} to {100 * interval[1]:+.1f}"
        lines.insert(
            1, f"Paired difference over {found.get('problems')} problems: {_points(mean)}, 95% interval {ends}"
        )
    if not interval or interval[0] <= 0 <= interval[1]:
        return Verdict(question, f"No clear change ({_points(mean)})", "neutral", lines, shares)
    answer, tone = ("Yes", "good") if mean > 0 else ("It fell", "bad")
    return Verdict(question, f"{answer}: {_points(mean)}", tone, lines, shares)


def trust_region(run: RunData) -> Verdict:
    question = "Is the trust region doing its job?"
    up, down = (column(run.metrics, f"masked_{sign}") for sign in ("positive", "negative"))
    if not any(value is not None for value in (*up, *down)):
        return Verdict(question, "Not measured", "neutral", ["No step has figures of it."])
    means = [_mean(side) for side in (up, down)]
    lines = [
        f"Masked on average: {_share(means[0])} of tokens with A\u00a0>\u00a00, {_share(means[1])} with A\u00a0<\u00a00"
    ]
    high = run.delta("high")
    if (p99 := _mean(column(run.metrics, "divergence_p99"))) is not None:
        against = "" if high is None else f", against delta {high:g}"
        lines.append(f"1 token in 100 diverges by more than {p99:.2g}{against}")
    if (first := next((v for v in column(run.metrics, "mismatch_mean") if v is not None), None)) is not None:
        lines.append(f"Sampler and trainer differ by {first:.2g} in mean |pi−mu| before any update")
    if filtered := _mean(column(run.metrics, "filtered")):
        lines.append(f"The off-policy filter dropped {_share(filtered)} of tokens with A\u00a0≠\u00a00")
    if (undecided := _mean(column(run.metrics, "undecided"))) is not None:
        lines.append(f"The exact divergence could decide otherwise for {_share(undecided)} of them")
    both = [max(a or 0.0, b or 0.0) for a, b in zip(up, down, strict=True)]
    if _updates(run.config) == 1 and not any(column(run.metrics, "staleness")):
        return Verdict(question, "It has nothing to do: one update per rollout, so pi is mu", "neutral", lines)
    if max(both) > BUSY:
        return Verdict(question, f"Too busy: up to {max(both):.0%} of one sign masked", "bad", lines)
    if max(both) == 0:
        return Verdict(question, f"It masked nothing in {len(both)} steps", "neutral", lines)
    if len(both) >= QUIET and max(both[-QUIET:]) == 0:
        return Verdict(question, f"Quiet: nothing masked in the last {QUIET} steps", "neutral", lines)
    steps = sum(value > 0 for value in both)
    return Verdict(question, f"Yes: it masked tokens in {steps} of {len(both)} steps", "good", lines)


def warnings(run: RunData, events: Sequence[Event]) -> Verdict:
    question = "Is anything wrong?"
    texts = [
        event.text if event.step is None else f"Step {event.step}: {event.text}"
        for event in events
        if event.kind != "resume"
    ]
    texts += run.problems
    if run.summary is None and not run.running:
        texts.append(f"It ended without a summary, as a run that is killed does; dppo train resume={run.path} goes on")
    if not texts:
        return Verdict(
            question, "Nothing was flagged", "good", ["The run gave no warning, and all its files could be read."]
        )
    word = "thing was" if len(texts) == 1 else "things were"
    return Verdict(question, f"{len(texts)} {word} flagged", "bad", texts)


def events_of(run: RunData) -> list[Event]:
    """Warnings, resumes and how the run ended, by step."""
    found = []
    for text in run.warnings:
        match = re.match(r"(?:after )?step (\d+): (.*)", text, flags=re.DOTALL)
        found.append(Event(int(match[1]), "warning", match[2]) if match else Event(None, "warning", text))
    for entry in run.resumes:
        changes = section(entry, "changes") if isinstance(entry, dict) else {}
        step = entry.get("step") if isinstance(entry, dict) else None
        changed = ", ".join(f"{key}: {value}" for key, value in changes.items())
        found.append(
            Event(step if isinstance(step, int) else None, "resume", f"went on{' with ' + changed if changed else ''}")
        )
    if (run.summary or {}).get("interrupted"):
        found.append(Event(run.steps, "stop", "the run was stopped before its last step"))
    return sorted(found, key=lambda event: -1 if event.step is None else event.step)


def state_of(run: RunData) -> str:
    """How far the run is, in words."""
    of = f"{run.steps} of {run.planned_steps} steps" if run.planned_steps else f"{run.steps} steps"
    if run.summary is None:
        return f"running: {of} so far" if run.running else f"not finished, and not running: {of}"
    return f"stopped early: {of}" if run.summary.get("interrupted") else f"finished: {of}"


def _of_training(run: RunData) -> list[str]:
    y = [value for value in column(run.metrics, "accuracy") if value is not None]
    few = max(1, len(y) // 10)
    return [f"Training samples: {_mean(y[:few]):.1%} right at first, {_mean(y[-few:]):.1%} lately"] if y else []


def _in_words(measured: dict[str, Any], of: str) -> str:
    """Of one set; of the run's own the difference has a line of its own."""
    parts = []
    for side in ("before", "after"):
        if found := measured.get(side):
            parts.append(f"{with_interval(number(found.get('accuracy')), found.get('interval'))} {side}")
    if of and (found := measured.get("difference")):
        mean = number(found.get("mean"))
        parts.append("difference not measured" if mean is None else f"difference {points(mean, found.get('interval'))}")
    return of + ", ".join(parts)


def _share_of(measured: dict[str, Any], side: str) -> tuple[float, float, float] | None:
    """A share with the ends of its interval."""
    found = measured.get(side) or {}
    share = number(found.get("accuracy"))
    if share is None:
        return None
    low, high = found.get("interval") or (share, share)
    return share, float(low), float(high)


def _points(share: float) -> str:
    return f"{100 * share:+.1f} points"


def _share(share: float | None) -> str:
    return "none" if share is None else percent(share) if share >= 0.01 or share == 0 else f"{share:.2%}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _updates(config: dict[str, Any]) -> float | None:
    """Updates per rollout, if the config says."""
    batch = section(config, "batch")
    step, update, epochs = (number(batch.get(k)) for k in ("prompts_per_step", "prompts_per_update", "epochs"))
    return step / update * (epochs or 1) if step and update else None
