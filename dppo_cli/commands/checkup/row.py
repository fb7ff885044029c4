"""What `dppo doctor` says of one thing that it looked at."""

from dataclasses import dataclass, field
from typing import Any

OK, WARNING, PROBLEM = "ok", "warning", "problem"
"""It works; training works, but something is missing or slow; training fails."""


@dataclass(frozen=True)
class Row:
    """`fix`: a command that mends it, or adds what is missing; `facts`: what programs want to know.

    Example: `Row("disk", OK, "12.0 GiB free in /home/me", facts={"free_gib": 12.0})`.
    """

    part: str
    status: str
    text: str
    fix: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def first_line(error: BaseException) -> str:
    """An error in a line; libraries write whole pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
