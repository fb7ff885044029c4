"""JSON objects from a file, one a line or in a list: finite, of moderate depth, all their text Unicode."""

import codecs
import json
import math
from collections.abc import Iterator
from typing import Any, NoReturn

from dppo_cli.errors import DataError

Row = dict[str, Any] | DataError
"""The columns of a row, or why there are none."""

MAX_LINE_MIB = 64
"""A longer line is no problem that a model can read; most likely it is a whole file written as one JSON array."""

MAX_DEPTH = 100
"""Deeper lists in lists cannot be handed to the process of a reward function: pickle ends below 500."""


def json_lines(name: str) -> Iterator[tuple[int, Row]]:
    """The objects of a file of JSON lines with their line numbers; blank lines are left out.

    Raises DataError for a file whose lines cannot be told apart: another encoding, or no line ends.
    """
    with open(name, "rb") as file:
        lines = iter(lambda: file.readline(MAX_LINE_MIB * 2**20 + 1), b"")
        for n, line in enumerate(lines, 1):
            if len(line) > MAX_LINE_MIB * 2**20:
                raise DataError(
                    f"{name}, line {n}: it is longer than {MAX_LINE_MIB} MiB; expected one JSON object a line"
                )
            if n == 1:
                _check_encoding(name, line)
            try:
                text = decoded(line)
                if text.strip():
                    yield n, _row(text)
            except DataError as error:
                yield n, error


def json_list(name: str) -> Iterator[tuple[int, Row]]:
    """The objects of a file that is one JSON list, counted from 0. Raises DataError if the file is none."""
    with open(name, "rb") as file:
        content = file.read()
    _check_encoding(name, content[:4])
    try:
        rows = _parsed(decoded(content))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{name} holds {type(rows).__name__}; expected a list of JSON objects, or JSON lines")
    for n, row in enumerate(rows):
        try:
            yield n, _checked(row)
        except DataError as error:
            yield n, error


def has_lines(name: str) -> bool:
    """Whether the first line of a file is a JSON object by itself, as in JSON lines."""
    with open(name, "rb") as file:
        line = file.readline(MAX_LINE_MIB * 2**20)
    try:
        return isinstance(_parsed(decoded(line)), dict)
    except DataError:
        return False


def _check_encoding(name: str, beginning: bytes) -> None:
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 < beginning[:4].count(0) < 4:
        raise DataError(f"{name}, line 1: it is UTF-16 or UTF-32 text; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")


def decoded(line: bytes) -> str:
    """A line, or a whole file, as text. Raises DataError for what is not UTF-8."""
    try:
        # The mark of an editor; not only in the first line, because files are put together with `cat`.
        return line.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 text ({error.reason} at byte {error.start + 1})") from None


def _row(text: str) -> dict[str, Any]:
    """The JSON object in a line. Raises DataError for all else."""
    row = _parsed(text)
    # Only an escape can leave half of a surrogate pair.
    return _checked(row, deep=text.count("[") + text.count("{") > MAX_DEPTH, halves=r"\ud" in text or r"\uD" in text)


def _parsed(text: str) -> Any:
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(f"no valid JSON ({error.msg} at {line}column {error.colno})") from None
    except ValueError:
        raise DataError("a number has too many digits; write it as text") from None
    except RecursionError:
        raise DataError(f"lists and objects are nested more than {MAX_DEPTH} deep") from None


def _checked(row: Any, deep: bool = True, halves: bool = True) -> dict[str, Any]:
    """`deep`, `halves`: whether too deep a nesting, or half of a surrogate pair, is possible."""
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, found {type(row).__name__}")
    try:
        if deep and _depth(row) > MAX_DEPTH:
            raise RecursionError
    except RecursionError:
        raise DataError(f"lists and objects are nested more than {MAX_DEPTH} deep") from None
    if halves:
        # Neither a tokenizer nor a file takes it.
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DataError(f"{ascii(half)[1:-1]} is half of a surrogate pair, which is no character") from None
    return row


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _constant(name: str) -> NoReturn:
    raise DataError(f"no valid JSON ({name} is not a JSON number)")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise DataError(f"the number {digits[:60]} is too large; write it as text")
    return value


DECODER = json.JSONDecoder(parse_constant=_constant, parse_float=_float)
