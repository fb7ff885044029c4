"""Checks of option values, and messages with the nearest right word. Imports no torch."""

import difflib
from dataclasses import fields
from typing import Any

from dppo_cli.errors import ConfigError


def did_you_mean(word: str, choices: Any) -> str:
    """'; did you mean X? Choices: ...', to end an error message with."""
    choices = sorted(map(str, choices))
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    return f"{guess} Choices: {', '.join(choices)}"


def check_choice(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise ConfigError, with the choices, unless `value` is one of them."""
    if value not in choices:
        names = ["null" if c is None else str(c) for c in choices]
        raise ConfigError(f"{key}={value} is an invalid value{did_you_mean(str(value), names)}")


def check_rules(where: str, of: Any, rules: dict[str, bool]) -> None:
    """Raise ConfigError for the first rule that does not hold; a rule's text names the field it is about."""
    for rule, holds in rules.items():
        if not holds:
            name = next(f.name for f in fields(of) if f.name in rule.split())
            raise ConfigError(f"{where + '.' if where else ''}{name}={getattr(of, name)} breaks the rule {rule}")
