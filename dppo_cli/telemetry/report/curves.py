"""Curves as plotly's JSON. Colours are names of CSS variables, which the page resolves for light and dark."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dppo_cli.config.checks import visible
from dppo_cli.telemetry.report.data import number

MOST_POINTS = 2000
"""Of a curve. More are thinned to the smallest and the largest of each stretch, so that no spike is lost."""
MOST_LINES = 60
"""Vertical lines for events."""

POSITIVE, NEGATIVE = "var(--positive)", "var(--negative)"
"""Tokens with A > 0 and with A < 0, here and in the samples."""
MAIN, SECOND, THIRD, FAINT, LIMIT = "var(--main)", "var(--second)", "var(--third)", "var(--faint)", "var(--limit)"
FOURTH, FIFTH, BAND = "var(--fourth)", "var(--fifth)", "var(--band)"
QUANTILES = ("var(--q1)", "var(--q2)", "var(--q3)", "var(--q4)")
"""From the median to the largest, or from the worst to the best: ever further from the colour of the page."""


@dataclass(frozen=True)
class Event:
    """Something that happened after a step. `kind`: warning, resume or stop."""

    step: int | None
    kind: str
    text: str


@dataclass(frozen=True)
class Figure:
    """`caption`: how to read it. `plot`: data and layout for plotly.js."""

    id: str
    title: str
    caption: str
    plot: dict[str, Any]


def column(rows: Sequence[Mapping[str, Any]], key: str) -> list[float | None]:
    """Values by step; `time.rollout` is in the section `time`. None where a row has none."""
    name, _, inner = key.partition(".")
    values = [row.get(name) for row in rows]
    if inner:
        values = [value.get(inner) if isinstance(value, Mapping) else None for value in values]
    return [number(value) for value in values]


def has(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return any(value is not None for value in column(rows, key))


def line(name: str, x: Sequence[Any], y: Sequence[float | None], colour: str, form: str, **more: Any) -> dict[str, Any]:
    """A curve without gaps at the ends. `form`: of its numbers, in d3's notation."""
    x, y = thinned(x, y)
    style = {"color": colour, "width": more.pop("width", 1.8), "dash": more.pop("dash", "solid")}
    return {
        "type": "scatter",
        "mode": "lines+markers" if sum(v is not None for v in y) < 3 else "lines",
        "name": plain(name),
        "x": x,
        "y": y,
        "line": style,
        "hovertemplate": f"%{{y:{form}}}",
        **more,
    }


def band(x: Sequence[Any], low: Sequence[float | None], high: Sequence[float | None]) -> list[dict[str, Any]]:
    """The area between two curves."""
    rows = [(a, b, c) for a, b, c in zip(x, low, high, strict=True) if b is not None and c is not None]
    edge = {"type": "scatter", "mode": "lines", "hoverinfo": "skip", "showlegend": False, "line": {"width": 0}}
    rows = rows[:: -(-len(rows) // MOST_POINTS) or 1]
    xs = [row[0] for row in rows]
    return [
        {**edge, "x": xs, "y": [row[1] for row in rows]},
        {**edge, "x": xs, "y": [row[2] for row in rows], "fill": "tonexty", "fillcolor": BAND},
    ]


def thinned(x: Sequence[Any], y: Sequence[float | None]) -> tuple[list[Any], list[float | None]]:
    if len(y) <= MOST_POINTS:
        return list(x), list(y)
    size, kept = len(y) / (MOST_POINTS // 2), {0, len(y) - 1}
    for i in range(MOST_POINTS // 2):
        stretch = [k for k in range(round(i * size), round((i + 1) * size)) if y[k] is not None]
        if stretch:
            kept |= {min(stretch, key=y.__getitem__), max(stretch, key=y.__getitem__)}  # type: ignore[arg-type]
    order = sorted(kept)
    return [x[k] for k in order], [y[k] for k in order]


def running_mean(y: Sequence[float | None], width: int) -> list[float | None]:
    """Mean over the last `width` steps that have a value."""
    found: list[float | None] = []
    recent: list[float] = []
    for value in y:
        recent = [*recent, value][-width:] if value is not None else recent
        found.append(sum(recent) / len(recent) if recent else None)
    return found


def plot(
    traces: Sequence[dict[str, Any]], form: str, events: Sequence[Event] = (), x: str = "step", **y_axis: Any
) -> dict[str, Any]:
    """Data and layout, checked by plotly."""
    import plotly.graph_objects as go

    axis = {"showline": False, "zeroline": False, "gridcolor": "var(--grid)", "tickcolor": "var(--grid)", "ticklen": 4}
    steps = [value for t in traces for value in t["x"]]
    few = {"dtick": 1} if steps and max(steps) - min(steps) <= 10 else {}  # whole steps only
    figure = go.Figure(
        data=list(traces),
        layout={
            "height": 256,
            "margin": {"l": 52, "r": 12, "t": 8, "b": 42},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"color": "var(--muted)", "size": 12, "family": "system-ui, sans-serif"},
            "hovermode": "x unified",
            "hoverlabel": {
                "bgcolor": "var(--surface)",
                "bordercolor": "var(--grid)",
                "font": {"color": "var(--text)", "size": 12},
                "namelength": 40,
            },
            "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "itemsizing": "constant"},
            "showlegend": sum(t.get("showlegend", True) for t in traces) > 1,
            "xaxis": {**axis, "title": {"text": x, "standoff": 12}, "showgrid": False, "tickformat": "~d", **few},
            "yaxis": {**axis, "tickformat": form, "nticks": 6, "exponentformat": "power", **y_axis},
            "shapes": event_lines(events),
            "dragmode": False,
        },
    )
    found: dict[str, Any] = figure.to_plotly_json()
    found["layout"].pop("template", None)
    return found


def log_axis(curves: Sequence[Sequence[float | None]], tickformat: str) -> dict[str, Any]:
    """Ticks that are neither crowded nor missing, however many decades there are."""
    values = [value for y in curves for value in y if value and value > 0]
    span = max(values) / min(values) if values else 1.0
    ticks = {"dtick": 1} if span > 30 else {"dtick": "D2"} if span > 4 else {}
    return {"type": "log", "tickformat": tickformat, **ticks}


def share_axis(curves: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """From 0; where all is 0, not to plotly's -100% to 100%."""
    zero = not any(value for y in curves for value in y)
    return {"tickformat": "~%", **({"range": [0, 0.01]} if zero else {"rangemode": "tozero"})}


def event_lines(events: Sequence[Event]) -> list[dict[str, Any]]:
    """A line in every figure where something happened."""
    colours = {"warning": "var(--warning)"}
    return [
        {
            "type": "line",
            "x0": event.step,
            "x1": event.step,
            "y0": 0,
            "y1": 1,
            "yref": "paper",
            "layer": "below",
            "line": {"width": 1.2, "dash": "dot", "color": colours.get(event.kind, "var(--faint)")},
        }
        for event in [event for event in events if event.step is not None][:MOST_LINES]
    ]


def limit(value: float, name: str) -> dict[str, Any]:
    """A horizontal line across a figure, for `layout.shapes`."""
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": value,
        "y1": value,
        "line": {"color": LIMIT, "width": 1.4, "dash": "dash"},
        "label": {
            "text": plain(name),
            "textposition": "end",
            "font": {"color": LIMIT, "size": 11},
            "yanchor": "bottom",
        },
    }


def plain(text: str) -> str:
    """Text for plotly, which takes some HTML as markup."""
    return html.escape(visible(text), quote=False)
