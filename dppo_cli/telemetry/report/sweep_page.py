"""The page of a sweep: leaderboard, curves of all jobs together, parallel coordinates of what varied."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dppo_cli.telemetry.report.curves import (
    FAINT,
    FIFTH,
    FOURTH,
    MAIN,
    QUANTILES,
    SECOND,
    THIRD,
    Figure,
    column,
    has,
    line,
    log_axis,
    plain,
    plot,
    share_axis,
)
from dppo_cli.telemetry.report.data import number
from dppo_cli.telemetry.report.page import LIMIT, Page, Served, figures_html, render, table_html
from dppo_cli.telemetry.report.sweep_data import Job, Setting, read_jobs, settings, shown, spread
from dppo_cli.telemetry.report.verdict import Verdict, events_of, learned, state_of

COLOURS = (MAIN, FIFTH, FOURTH, THIRD, SECOND, FAINT)
DASHES = ("solid", "dash", "dot")
"""With the colours, 18 settings look different; more share a look, and are named where one points at them."""
CURVES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "accuracy": ("Accuracy of the training samples", ".1%", {"tickformat": ".0%"}),
    "eval_accuracy": ("Accuracy on held-out problems", ".1%", {"tickformat": ".0%"}),
    "reward": ("Reward", ".3f", {}),
    "entropy": ("Entropy", ".3f", {"rangemode": "tozero"}),
    "masked_positive": ("Masked tokens, A > 0", ".2%", {"share": True}),
    "masked_negative": ("Masked tokens, A < 0", ".2%", {"share": True}),
    "filtered": ("Tokens that the off-policy filter dropped", ".2%", {"share": True}),
    "divergence_p99": ("Divergence, 99% of tokens below", ".2~e", {"log": "~g"}),
    "response_tokens": ("Tokens of a response", ".4~g", {"rangemode": "tozero"}),
    "time.tokens_per_second": ("Tokens per second", ".3~s", {"rangemode": "tozero", "tickformat": "~s"}),
}
MOST_JOBS = 200
"""In the curves: more lines than that show nothing, and make the file large."""


def sweep_page(folder: Path, served: Served | None = None) -> str:
    """HTML of at most LIMIT bytes. Raises RunError if there are no jobs to be read."""
    jobs = read_jobs(folder)
    ranked = settings(jobs)
    failed = [job for job in jobs if job.error is not None or job.run is None]
    figures = curves(ranked)
    parallel = coordinates(ranked)
    everything = [*figures, *([parallel] if parallel else [])]
    page = Page(
        title=folder.resolve().name,
        facts=[f"sweep of {len(jobs)} jobs", f"{len(ranked)} settings", f"{len(failed)} failed"],
        verdicts=[_best(ranked), _clear(ranked), _wrong(jobs)],
        data={"figures": {figure.id: figure.plot for figure in everything}},
    )
    page.sections.append(("Leaderboard", "leaderboard", _leaderboard(ranked)))
    if parallel is not None:
        page.sections.append(("What varied", "varied", figures_html([parallel])))
    if figures:
        page.sections.append(("Curves of all jobs", "curves", figures_html(figures)))
    page.sections.append(("Jobs", "jobs", _jobs(jobs)))
    html = render(page, served)
    if len(html.encode()) > LIMIT:
        # Thousands of jobs: the leaderboard is what is left to look at.
        page.sections = [section for section in page.sections if section[1] != "curves"]
        page.data["figures"] = {parallel.id: parallel.plot} if parallel else {}
        html = render(page, served)
    return html


def curves(ranked: Sequence[Setting]) -> list[Figure]:
    """A figure for each kind of number, a line for each job; seeds of a setting look alike."""
    found = []
    for key, (title, form, axis) in CURVES.items():
        traces, lines = [], 0
        for i, setting in enumerate(ranked):
            look = {"colour": COLOURS[i % len(COLOURS)], "dash": DASHES[i // len(COLOURS) % len(DASHES)]}
            named = False
            for job in setting.jobs:
                rows = job.run.metrics if job.run is not None else []
                if lines == MOST_JOBS or not has(rows, key):
                    continue
                y = column(rows, key)
                if "log" in axis:
                    y = [v if v and v > 0 else None for v in y]
                points = [(row["step"], v) for row, v in zip(rows, y, strict=True) if v is not None]
                x = [p[0] for p in points]
                trace = line(
                    setting.name, x, [p[1] for p in points], look["colour"], form, dash=look["dash"], width=1.4
                )
                traces.append({**trace, "legendgroup": str(i), "showlegend": not named})
                named, lines = True, lines + 1
        if traces:
            more, values = dict(axis), [trace["y"] for trace in traces]
            if more.pop("share", False):
                more |= share_axis(values)
            if (ticks := more.pop("log", None)) is not None:
                more |= log_axis(values, ticks)
            figure = plot(traces, more.pop("tickformat", "~g"), **more)
            figure["layout"] |= {"hovermode": "closest", "showlegend": len(ranked) > 1}
            found.append(
                Figure(key.replace(".", "-"), title, "One line a job; jobs of one colour differ in the seed.", figure)
            )
    return found


def coordinates(ranked: Sequence[Setting]) -> Figure | None:
    """Parallel coordinates: an upright axis for each key that varied and for the accuracy, a line for each job.

    Drawn with plain lines, because plotly's own kind needs WebGL and code made from text, which the page forbids.
    """
    keys = list(ranked[0].values) if ranked else []
    jobs = [(s, job, after) for s in ranked for job in s.jobs if (after := job.accuracy("after")) is not None][
        :MOST_JOBS
    ]
    if not keys or len(jobs) < 2:
        return None
    scales = {key: _positions([s.values[key] for s in ranked]) for key in keys}
    accuracies = [after for _, _, after in jobs]
    low, high = min(accuracies), max(accuracies)
    width = (high - low) or 1.0
    traces = []
    for setting, job, after in jobs:
        at = (after - low) / width
        y = [scales[key][repr(setting.values[key])] for key in keys] + [at]
        shade = QUANTILES[min(3, int(4 * at))]
        name = f"{setting.name}, job {job.name}: {after:.1%}"
        trace = line(name, list(range(len(y))), y, shade, "", width=2)
        traces.append(
            {**trace, "mode": "lines+markers", "showlegend": False, "hovertemplate": f"{plain(name)}<extra></extra>"}
        )
    layout = plot(traces, "", x="")
    notes = [
        {
            "x": i,
            "y": position,
            "text": plain(label),
            "xanchor": "left",
            "xshift": 5,
            "showarrow": False,
            "bgcolor": "var(--surface)",
        }
        for i, key in enumerate(keys)
        for label, position in {shown(s.values[key]): scales[key][repr(s.values[key])] for s in ranked}.items()
    ]
    notes += [
        {"x": len(keys), "y": position, "text": f"{value:.1%}", "xanchor": "left", "xshift": 5, "showarrow": False}
        for value, position in ((low, 0.0), (high, 1.0))
    ]
    names = [key.removesuffix("._target_") for key in keys] + ["accuracy after"]
    layout["layout"] |= {"annotations": notes, "hovermode": "closest", "height": 340, "showlegend": False}
    layout["layout"]["xaxis"] |= {
        "tickvals": list(range(len(names))),
        "ticktext": [plain(name) for name in names],
        "range": [-0.15, len(names) - 0.55],
        "showgrid": True,
        "gridcolor": "var(--faint)",
    }
    layout["layout"]["yaxis"] |= {"visible": False, "range": [-0.08, 1.08]}
    layout["layout"]["margin"] |= {"l": 16}
    caption = "A line a job. The better its accuracy after training, the further its colour is from that of the page."
    return Figure("coordinates", "Parallel coordinates", caption, layout)


def _positions(values: Sequence[Any]) -> dict[str, float]:
    """Of each value on its axis, from 0 to 1: numbers by size, where they span a factor of ten by its logarithm."""
    distinct = {repr(value): value for value in values}
    numbers = {name: number(value) for name, value in distinct.items()}
    if all(value is not None for value in numbers.values()) and len(numbers) > 1:
        size = {name: float(value or 0) for name, value in numbers.items()}
        if min(size.values()) > 0 and max(size.values()) / min(size.values()) >= 3:
            size = {name: math.log(value) for name, value in size.items()}
        low, high = min(size.values()), max(size.values())
        return {name: (value - low) / (high - low) for name, value in size.items()}
    return {name: i / max(1, len(distinct) - 1) for i, name in enumerate(sorted(distinct))}


def _leaderboard(ranked: Sequence[Setting]) -> str:
    keys = list(ranked[0].values) if ranked else []
    rows = []
    for place, setting in enumerate(ranked, 1):
        pairs = [(job.accuracy("before"), job.accuracy("after")) for job in setting.jobs]
        gains = [b - a for a, b in pairs if a is not None and b is not None]
        values = [shown(value) for value in setting.values.values()]
        after = setting.figures("after")
        ends = f"{min(after):.1%} to {max(after):.1%}" if len(after) > 1 else "–"
        cells = (len(setting.jobs), spread(setting.figures("before")), spread(after), ends, spread(gains))
        rows.append((place, *values, *cells, ", ".join(job.name for job in setting.jobs)))
    names = [key.removesuffix("._target_") for key in keys]
    head = ("", *names, "seeds", "before", "after", "lowest to highest", "gain", "jobs")
    first = len(names) + 1
    caption = "Held-out accuracy, mean ± standard deviation over seeds; the best first"
    return table_html(head, rows, caption, numeric=(0, *range(first, first + 5)))


def _jobs(jobs: Sequence[Job]) -> str:
    rows = []
    for job in jobs:
        state = state_of(job.run) if job.run is not None else "no run"
        known: Mapping[str, Any] = job.config
        accuracy = [f"{v:.1%}" if (v := job.accuracy(side)) is not None else "–" for side in ("before", "after")]
        flags = len(job.run.warnings) + len(job.run.problems) if job.run is not None else 0
        rows.append(
            (job.name, known.get("seed", "–"), *accuracy, flags, f"failed: {job.error}" if job.error else state)
        )
    return table_html(("job", "seed", "before", "after", "warnings", "state"), rows, "In order", numeric=(2, 3, 4))


def _best(ranked: Sequence[Setting]) -> Verdict:
    question = "Which setting is best?"
    if not ranked or ranked[0].mean_after is None:
        return Verdict(question, "Not known yet", "neutral", ["No job has been evaluated after training."])
    best = ranked[0]
    lines = [f"{spread(best.figures('after'))} right after training, over {_count(len(best.figures('after')), 'seed')}"]
    lines.append(f"{spread(best.figures('before'))} before")
    return Verdict(question, best.name, "good", lines)


def _clear(ranked: Sequence[Setting]) -> Verdict:
    """Whether the seeds of the best and of the second overlap."""
    question = "Is it clearly ahead?"
    measured = [setting for setting in ranked if setting.mean_after is not None]
    if len(measured) < 2:
        return Verdict(question, "Nothing to compare with", "neutral")
    first, second = (setting.figures("after") for setting in measured[:2])
    lines = [f"Second: {measured[1].name} with {spread(second)}"]
    if min(len(first), len(second)) < 2:
        lines.append("One seed says little: runs differ by their seed alone. Add seed=1,2,3.")
        return Verdict(question, "Cannot be said from one seed", "neutral", lines)
    if min(first) > max(second):
        lines.append(f"Its worst seed ({min(first):.1%}) beats the best of the second ({max(second):.1%})")
        return Verdict(question, "Yes: in every seed", "good", lines)
    lines.append(f"Seeds overlap: from {min(first):.1%}, and up to {max(second):.1%}")
    return Verdict(question, "No: the seeds overlap", "neutral", lines)


def _wrong(jobs: Sequence[Job]) -> Verdict:
    question = "Is anything wrong?"
    lines = [f"Job {job.name} failed: {job.error}" for job in jobs if job.error is not None]
    for job in jobs:
        if job.run is None:
            continue
        texts = [event.text for event in events_of(job.run) if event.kind == "warning"] + job.run.problems
        lines += [f"Job {job.name}: {text}" for text in texts]
        if job.error is None and (fell := learned(job.run)).tone == "bad":
            lines.append(f"Job {job.name}: accuracy fell, {fell.answer.partition(': ')[2]}")
    if not lines:
        return Verdict(question, "Nothing was flagged", "good", ["No job failed or gave a warning."])
    return Verdict(question, f"{_count(len(lines), 'thing')} flagged", "bad", lines)


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
