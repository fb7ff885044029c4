"""Checks of option values, and messages with the nearest right word. Imports no torch."""

import difflib
import os
import re
import sys
from dataclasses import fields
from typing import Any

from dppo_cli.errors import ConfigError

SAMPLE_BYTES = 2048
"""Memory of a sample of one token, with all that is kept of it: measured 3 to 4 KiB."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a cursor, breaks a line, changes colours or turns text round, and halves of surrogate pairs."""
SECRET = re.compile(
    r"oc\.env:\s*['\"]?(\w*(?:TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|(?:API|ACCESS|PRIVATE)_?KEY)\w*)", re.I
)


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


def check_fits(key: str, value: int, samples: int) -> None:
    """Raise ConfigError if so many samples cannot fit into the memory of this machine, however short they are."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else sys.maxsize
    if samples * SAMPLE_BYTES > memory:
        raise ConfigError(
            f"{key}={value} makes {samples:,} samples at once, {samples * SAMPLE_BYTES / 2**30:,.0f} GiB or more, and "
            f"this machine has {memory / 2**30:.0f} GiB; lower it"
        )


def check_rules(where: str, of: Any, rules: dict[str, bool]) -> None:
    """Raise ConfigError for the first rule that does not hold; a rule's text names the field it is about."""
    for rule, holds in rules.items():
        if not holds:
            name = next(f.name for f in fields(of) if f.name in rule.split())
            raise ConfigError(f"{where + '.' if where else ''}{name}={getattr(of, name)} breaks the rule {rule}")


def check_no_secrets(text: str) -> None:
    """Raise ConfigError if a config, or a word of the command line, takes a secret from the environment.

    What is in a config is shown and written. Libraries that need a secret read it from the environment themselves.
    """
    if match := SECRET.search(text):
        raise ConfigError(
            f"${{oc.env:{match[1]}}} would put a secret into files; leave it out: libraries that need {match[1]} read "
            "it from the environment"
        )


def escaped(value: Any) -> Any:
    """Text that looks like an interpolation and is none, as OmegaConf reads it back."""
    if isinstance(value, dict):
        return {key: escaped(child) for key, child in value.items()}
    if isinstance(value, list):
        return [escaped(child) for child in value]
    return re.sub(r"(\\*)\$\{", lambda m: f"{m[1] * 2}\\${{", value) if isinstance(value, str) else value


def visible(text: str, keep: str = "") -> str:
    """Text whose control characters, apart from those in `keep`, are written out: none acts on a terminal."""
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else found[0].encode("unicode_escape").decode(), text)
