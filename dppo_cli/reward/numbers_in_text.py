"""Numbers as people write them: `-1,234.5`, `$3`, `1e-3`, `3/4`, `50%`."""

import math
from decimal import Decimal

import regex  # type: ignore[import-untyped]

NUMBER = regex.compile(
    r"(?:(?<![\w)])[-+−])?\$?(?:(?:\d{1,3}(?:,\d{3})++(?!\d)|\d++)(?:\.\d++)?|\.\d++)(?:[eE][-+]?\d{1,4}(?!\w))?"
    r"(?:/\d++(?:\.\d++)?)?%?"
)
LONGEST = 400
"""Characters of a number that is still read: more than a float has."""


def last_number(text: str) -> str | None:
    """The last number in a text, as it is written."""
    found = None
    for found in NUMBER.finditer(text):  # noqa: B007
        pass
    return found.group() if found else None


def value_of(text: str) -> Decimal | None:
    """The value of a text that is one number; None for all other text. A percentage is its number."""
    text = text.strip()
    if len(text) > LONGEST or not NUMBER.fullmatch(text):
        return None
    plain = text.replace("−", "-").replace("$", "").replace(",", "").removesuffix("%")
    over, _, under = plain.partition("/")
    if not under:
        return Decimal(over)
    return Decimal(over) / Decimal(under) if Decimal(under) else None


def equal(a: Decimal, b: Decimal, relative: float, absolute: float) -> bool:
    """Equal as decimal numbers, or within a tolerance."""
    x, y = float(a), float(b)
    return a == b or (math.isfinite(x) and math.isfinite(y) and math.isclose(x, y, rel_tol=relative, abs_tol=absolute))


def written(value: Decimal) -> str:
    """The same text for equal numbers, however they were written."""
    if not value:
        return "0"
    sign, digits, exponent = value.as_tuple()
    assert isinstance(exponent, int)
    text = "".join(map(str, digits)).lstrip("0")
    kept = text.rstrip("0")
    exponent += len(text) - len(kept)
    if 0 <= exponent < LONGEST:
        kept += "0" * exponent
    elif -LONGEST < exponent < 0:
        kept = kept.zfill(1 - exponent)
        kept = f"{kept[:exponent]}.{kept[exponent:]}"
    else:
        kept = f"{kept}e{exponent}"
    return f"-{kept}" if sign else kept
