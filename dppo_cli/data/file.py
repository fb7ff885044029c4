"""Problems from a file of JSON lines."""

import codecs
import json
import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dppo_cli.config.build import FilePath
from dppo_cli.config.checks import did_you_mean
from dppo_cli.data.task import Task
from dppo_cli.errors import ConfigError, DataError
from dppo_cli.types import Example

MAX_LINE_MIB = 64
"""A longer line is no problem that a model can read; most likely it is a whole file written as one JSON array."""

MAX_DEPTH = 100
"""Deeper lists in lists cannot be handed to the process of a reward function: pickle ends below 500."""


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line; conf/data/file.yaml explains the fields."""

    path: FilePath
    eval_path: FilePath | None
    eval_problems: int | None
    prompt_column: str
    answer_column: str
    answer_pattern: str | None

    def __post_init__(self) -> None:
        if self.eval_path is None and self.eval_problems is None:
            raise ConfigError("set data.eval_path, or data.eval_problems to hold out that many lines of data.path")
        if self.eval_problems is not None and self.eval_problems < 1:
            raise ConfigError(f"data.eval_problems={self.eval_problems} breaks the rule eval_problems >= 1")
        if self.answer_pattern is not None:
            try:
                groups = re.compile(self.answer_pattern).groups
            except re.error as error:
                raise ConfigError(
                    f"data.answer_pattern={self.answer_pattern!r} is not a regular expression: {error}"
                ) from None
            if groups < 1:
                raise ConfigError(
                    f"data.answer_pattern={self.answer_pattern!r} has no group; put ( ) around the answer"
                )

    def load(self) -> Task:
        train = self._read(self.path)
        if self.eval_path is not None:
            return Task(train, self._read(self.eval_path)[: self.eval_problems])
        assert self.eval_problems is not None
        if len(train) <= self.eval_problems:
            raise DataError(
                f"{self.path} has {len(train)} problems, and data.eval_problems={self.eval_problems} of them would be "
                "held out: none is left to train on; lower it, or set data.eval_path"
            )
        return Task(train[: -self.eval_problems], train[-self.eval_problems :])

    def _read(self, name: str) -> list[Example]:
        _check_is_file(name)
        examples = []
        try:
            with open(name, "rb") as file:
                lines = iter(lambda: file.readline(MAX_LINE_MIB * 2**20 + 1), b"")
                for n, line in enumerate(lines, 1):
                    try:
                        text = _decode(line, first=n == 1)
                        if text.strip():
                            examples.append(self._example(_row(text)))
                    except DataError as error:
                        raise DataError(f"{name}, line {n}: {error}") from None
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}") from None
        if not examples:
            raise DataError(f"{name} is empty; expected one JSON object a line")
        return examples

    def _example(self, row: dict[str, Any]) -> Example:
        prompt = _column(row, self.prompt_column, "data.prompt_column")
        answer = _column(row, self.answer_column, "data.answer_column")
        if self.answer_pattern is not None:
            match = re.search(self.answer_pattern, answer)
            if match is None or match.group(1) is None:
                raise DataError(f"data.answer_pattern={self.answer_pattern!r} does not match {answer[-60:]!r}")
            answer = match.group(1)
        if not prompt.strip():
            raise DataError("the prompt is empty")
        reserved = (self.prompt_column, self.answer_column, "prompts", "completions", "answer")
        return Example(prompt, answer, {k: v for k, v in row.items() if k not in reserved})


def _check_is_file(name: str) -> None:
    """Raise DataError for what is no file. A pipe could block when it is opened, and a device might never end."""
    try:
        mode = os.stat(name).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise DataError(f"there is no file {name} (in {Path.cwd()})") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        raise DataError(f"{name} is a folder; name a file of JSON lines in it")
    if not stat.S_ISREG(mode):
        raise DataError(f"{name} is not a regular file but a device, a pipe or a socket; write its content to a file")


def _decode(line: bytes, first: bool) -> str:
    if len(line) > MAX_LINE_MIB * 2**20:
        raise DataError(f"it is longer than {MAX_LINE_MIB} MiB; expected one JSON object a line")
    if first and (line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or 0 < line[:4].count(0) < 4):
        raise DataError("it is UTF-16 or UTF-32 text; convert it: iconv -f UTF-16 -t UTF-8 OLD > NEW")
    try:
        # The mark of an editor; not only in the first line, because files are put together with `cat`.
        return line.removeprefix(codecs.BOM_UTF8).removesuffix(b"\n").decode()
    except UnicodeDecodeError as error:
        raise DataError(f"it is not UTF-8 text ({error.reason} at byte {error.start + 1})") from None


def _row(text: str) -> dict[str, Any]:
    """The JSON object in a line: finite, of moderate depth, all its text Unicode. Raises DataError for all else."""
    try:
        row = DECODER.decode(text)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(row) > MAX_DEPTH:
            raise RecursionError
    except json.JSONDecodeError as error:
        raise DataError(f"no valid JSON ({error.msg} at column {error.colno})") from None
    except ValueError:
        raise DataError("a number has too many digits; write it as text") from None
    except RecursionError:
        raise DataError(f"lists and objects are nested more than {MAX_DEPTH} deep") from None
    if not isinstance(row, dict):
        raise DataError(f"expected a JSON object, found {type(row).__name__}")
    if r"\ud" in text or r"\uD" in text:
        # Only an escape can leave half of a pair. Neither a tokenizer nor a file takes it.
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


def _column(row: Mapping[str, Any], name: str, key: str) -> str:
    if name not in row:
        # A row may have thousands of columns, and line breaks in their names.
        names = [column[:60] if column[:60].isprintable() else repr(column[:60]) for column in list(row)[:100]]
        raise DataError(f"there is no column {name!r} ({key}){did_you_mean(name, names)}")
    value = row[name]
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise DataError(f"column {name!r} holds {type(value).__name__}; expected text or a number")
    return str(value)
