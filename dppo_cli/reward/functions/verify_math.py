"""Mathematical equality by math-verify, in a process that is killed if it takes too long.

math-verify's own time limits are off: they are signals, which a long step inside a library does not see.
"""

import logging
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

MARKS = ("$", r"\boxed", r"\(", r"\[")
"""Where one of these is, math-verify finds the mathematics by itself."""
LONGEST = 200
"""Characters of an answer that is kept for a majority vote."""

logging.getLogger("math_verify").setLevel(logging.CRITICAL)


def score(
    completions: Sequence[str],
    answer: Sequence[str],
    log_extra: Callable[[str, Sequence[Any]], None],
    boxed_only: bool,
) -> list[float | None]:
    """1.0 for each response whose last answer equals the right one; None where the right one cannot be read."""
    found = [_score(text, right, boxed_only) for text, right in zip(completions, answer, strict=True)]
    log_extra("answer", [answer for _, answer, _ in found])
    log_extra("note", [note for _, _, note in found])
    return [value for value, _, _ in found]


def _score(text: str, right: str, boxed_only: bool) -> tuple[float | None, str | None, str]:
    gold = _gold(right)
    if not gold:
        return None, None, f"the answer {right[-60:]!r} is not mathematics that can be read"
    found = parse(text, _targets(boxed_only), parsing_timeout=None)
    if not found:
        return 0.0, None, "no answer was found"
    return float(verify(list(gold), found, timeout_seconds=None)), _text(found), ""


@lru_cache(1024)
def _gold(right: str) -> tuple[Any, ...]:
    marked = right if any(mark in right for mark in MARKS) else f"${right}$"
    return tuple(parse(marked, parsing_timeout=None) if right.strip() else ())


def _targets(boxed_only: bool) -> list[Any]:
    if boxed_only:
        return [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
    return [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]


def _text(found: Sequence[Any]) -> str:
    """The same text for answers that are written differently, as far as sympy brings them into one form."""
    try:
        return str(found[0])[:LONGEST]
    except (ValueError, RecursionError):
        return str(found[-1])[:LONGEST]
