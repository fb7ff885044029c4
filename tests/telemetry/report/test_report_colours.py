"""Contrast of text in both themes, by WCAG 2.1: 4.5 for text, 3 for curves."""

import re
from importlib import resources

import pytest

CSS = resources.files("dppo_cli.telemetry.report").joinpath("report.css").read_text(encoding="utf-8")
THEMES = ("light", "dark")
SHADES = {
    name: dict(zip(THEMES, pair, strict=True))
    for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", CSS)
}
MIX = 0.12
"""Share of the hue in the background of a token, for each of four levels."""


def rgb(shade: str) -> list[float]:
    return [int(shade[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def luminance(colour: list[float]) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[float], other: list[float]) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", ["text", "muted", "link", "good", "bad"])
def test_text_can_be_read_on_every_ground(name: str, theme: str) -> None:
    for ground in ("page", "surface", "raised"):
        assert contrast(rgb(SHADES[name][theme]), rgb(SHADES[ground][theme])) >= 4.5, ground


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("hue", ["divergence", "above", "below", "positive", "negative"])
def test_a_token_can_be_read_on_its_colour(hue: str, theme: str) -> None:
    assert f"calc(var(--level, 0) * {MIX:.0%})" in CSS
    mixed = zip(rgb(SHADES[hue][theme]), rgb(SHADES["surface"][theme]), strict=True)
    ground = [4 * MIX * a + (1 - 4 * MIX) * b for a, b in mixed]
    assert contrast(rgb(SHADES["text"][theme]), ground) >= 4.5


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", ["main", "second", "third", "fourth", "fifth", "positive", "negative", "limit", "q4"])
def test_curves_can_be_told_from_their_ground(name: str, theme: str) -> None:
    assert contrast(rgb(SHADES[name][theme]), rgb(SHADES["surface"][theme])) >= 3


def test_quantiles_get_ever_further_from_the_ground() -> None:
    for theme in THEMES:
        steps = [contrast(rgb(SHADES[f"q{i}"][theme]), rgb(SHADES["surface"][theme])) for i in (1, 2, 3, 4)]
        assert steps == sorted(steps)
