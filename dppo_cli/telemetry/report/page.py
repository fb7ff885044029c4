"""One self-contained HTML file: static text first, then data, then the scripts, which no address but its own can leave.

A Content-Security-Policy allows the embedded scripts and styles by their hash and nothing from anywhere else. Whatever
a run has in text is escaped here, or reaches the page as JSON and is shown with textContent.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from dppo_cli import __version__
from dppo_cli.config.checks import visible
from dppo_cli.errors import ConfigError
from dppo_cli.telemetry.report.curves import Figure
from dppo_cli.telemetry.report.verdict import Verdict

LIMIT = 20_000_000
"""Bytes of a file."""
EMPTY = "sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU="
"""Of no text: plotly.js makes an empty <style>, which it then fills by rules."""
OWN_STYLES = re.compile(r"getElementById\(\"([0-9a-f]{64})\"\)")
"""Ids of styles that plotly.js brings for maps, unless they are there. Empty ones keep it from that: none are drawn."""
MOST_LINES = 4
"""Of a verdict, before the rest is folded away."""
SYMBOLS = {"good": "✓", "neutral": "–", "bad": "!"}


@dataclass
class Page:
    """`sections`: heading, id and HTML. `data`: JSON for the scripts. `blocks`: samples by step, already packed."""

    title: str
    facts: list[str]
    verdicts: list[Verdict] = field(default_factory=list)
    sections: list[tuple[str, str, str]] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    blocks: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """Of a page that asks where it came from, every `refresh` seconds, whether `version` is still the newest.

    `packed`: samples that an earlier version has packed.
    """

    refresh: float
    version: str
    packed: dict[Hashable, tuple[str, int]] = field(default_factory=dict)


def render(page: Page, served: Served | None = None) -> str:
    """The page as text."""
    style = _asset("report.css")
    scripts = [plotly_js(), _asset("samples.js"), _asset("report.js")]
    data = {**page.data, "served": served and {"refresh": served.refresh, "version": served.version}}
    links = "".join(f'<a href="#{name}">{text(heading)}</a>' for heading, name, _ in page.sections)
    styles = "".join(f'<style id="{name}"></style>' for name in sorted(set(OWN_STYLES.findall(scripts[0]))))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy(style, scripts, served is not None)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="referrer" content="no-referrer"><link rel="icon" href="data:,">',
        f'<meta name="generator" content="dppo {__version__}"><title>{text(page.title)} – dppo report</title>',
        f"<style>{style}</style>{styles}</head><body>",
        '<a class="skip" href="#main">Skip to content</a>',
        f'<header><div class="bar"><h1>{text(page.title)}</h1>',
        '<button id="theme" type="button" aria-label="Switch between light and dark">◐</button></div>',
        f'<p class="facts">{" <span>·</span> ".join(map(text, page.facts))}</p>',
        f'<nav aria-label="Sections">{links}</nav></header><main id="main" tabindex="-1">',
        f'<section aria-label="Summary" class="verdicts">{"".join(map(_verdict, page.verdicts))}</section>',
        *(
            f'<section aria-labelledby="{name}"><h2 id="{name}">{text(h)}</h2>{body}</section>'
            for h, name, body in page.sections
        ),
        "</main>",
        f"<footer><p>Made by dppo {__version__}. Nothing here is loaded from, or sent to, another place.</p></footer>",
        f'<script type="application/json" id="data">{embedded(data)}</script>',
        *(f'<script type="application/gzip" id="step-{step}">{block}</script>' for step, block in page.blocks.items()),
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def policy(style: str, scripts: Sequence[str], served: bool) -> str:
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(f"'{_hash(script)}'" for script in scripts),
        # plotly.js sets attributes of SVG elements, which cannot be hashed; they can load nothing.
        "style-src-elem": f"'{_hash(style)}' '{EMPTY}'",
        "style-src-attr": "'unsafe-inline'",
        "img-src": "data: blob:",
        "connect-src": "'self'" if served else "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def embedded(data: Any) -> str:
    """JSON that ends no <script> and that JavaScript reads back as it was."""
    found = json.dumps(data, separators=(",", ":"), allow_nan=False)  # ASCII, so U+2028 is escaped, too
    return found.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def text(value: Any) -> str:
    """Text as it is shown, never as markup. Control characters are written out."""
    return html.escape(visible(str(value)))


def plotly_js() -> str:
    """The script of the installed package. Raises ConfigError if it is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError("dppo report draws with plotly, which is not installed; pip install 'dppo[report]'") from None
    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script")


def figure_html(figure: Figure) -> str:
    """Where a figure is drawn, with its heading and how to read it."""
    title = text(figure.title)
    return (
        f'<figure id="figure-{figure.id}"><h3>{title}</h3><figcaption>{text(figure.caption)}</figcaption>'
        f'<div class="curves" data-figure="{figure.id}" role="img" aria-label="{title}; the numbers are under Values">'
        '</div><details><summary>Values</summary><div class="values"></div></details></figure>'
    )


def figures_html(figures: Iterable[Figure]) -> str:
    return f'<div class="figures">{"".join(map(figure_html, figures))}</div>'


def table_html(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str, numeric: Sequence[int] = ()) -> str:
    """A table that scrolls sideways on a narrow screen."""

    def cell(i: int, value: Any) -> str:
        return f'<td class="number">{text(value)}</td>' if i in numeric else f"<td>{text(value)}</td>"

    heads = "".join(
        f'<th scope="col"{" class=number" if i in numeric else ""}>{text(h)}</th>' for i, h in enumerate(head)
    )
    body = "".join(f"<tr>{''.join(cell(i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(caption)}"><table><caption><span>'
        f"{text(caption)}</span></caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def pairs_html(pairs: Mapping[str, Any]) -> str:
    rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(v)}</dd></div>" for k, v in pairs.items())
    return f'<dl class="pairs">{rows}</dl>'


def _verdict(verdict: Verdict) -> str:
    lines = [f"<li>{text(line)}</li>" for line in verdict.lines]
    if len(lines) > MOST_LINES:
        more = "".join(lines[MOST_LINES:])
        summary = f"<summary>{len(lines) - MOST_LINES} more</summary>"
        lines = [*lines[:MOST_LINES], f"<li><details>{summary}<ul>{more}</ul></details></li>"]
    return (
        f'<article class="verdict {verdict.tone}"><h2>{text(verdict.question)}</h2>'
        f'<p class="answer"><span aria-hidden="true">{SYMBOLS[verdict.tone]}</span> {text(verdict.answer)}</p>'
        f"{''.join(map(_bar, verdict.shares))}<ul>{''.join(lines)}</ul></article>"
    )


def _bar(share: tuple[str, float, float, float]) -> str:
    """A point and its interval on a line from 0 to 100%. The verdict's lines say the same in words."""
    name, middle, low, high = share
    span = f"left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"
    return (
        f'<div class="share" aria-hidden="true"><span>{text(name)}</span><span class="track">'
        f'<i style="{span}"></i><b style="left:{100 * middle:.2f}%"></b></span><span>{middle:.1%}</span></div>'
    )


def _asset(name: str) -> str:
    return resources.files("dppo_cli.telemetry.report").joinpath(name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
