"""Regular expressions over responses, which may be made to take forever: they end after `PATIENCE` seconds."""

from typing import Any

import regex  # type: ignore[import-untyped]

from dppo_cli.errors import ConfigError

PATIENCE = 1.0
"""Seconds that a search in one response may take. Python's own `re` could not be interrupted."""


class TooSlowError(Exception):
    """A pattern took longer than `PATIENCE` on a response. The text says so."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key} took longer than {PATIENCE:g} s on the response")


def compiled(key: str, pattern: str) -> Any:
    """Raises ConfigError, which names the key, for what is not a regular expression."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        raise ConfigError(f"{key}={pattern!r} is not a regular expression: {error}") from None


def last_match(key: str, pattern: Any, text: str) -> str | None:
    """The last match, or the first group of it, without white space around it. Raises TooSlowError."""
    found = None
    try:
        for found in pattern.finditer(text, timeout=PATIENCE):  # noqa: B007
            pass
    except TimeoutError:
        raise TooSlowError(key) from None
    taken = found.group(1 if pattern.groups else 0) if found else None
    return None if taken is None else str(taken).strip()


def matches(key: str, pattern: Any, text: str) -> bool:
    """Whether the whole text matches. Raises TooSlowError."""
    try:
        return pattern.fullmatch(text, timeout=PATIENCE) is not None
    except TimeoutError:
        raise TooSlowError(key) from None
