"""Problems from a file of JSON lines."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dppo_cli.config.build import FilePath
from dppo_cli.config.checks import did_you_mean
from dppo_cli.data.task import Task
from dppo_cli.errors import ConfigError, DataError
from dppo_cli.types import Example


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

    def _read(self, name: str) -> Sequence[Example]:
        path = Path(name)
        if not path.is_file():
            raise DataError(f"there is no file {name} (in {Path.cwd()})")
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (UnicodeDecodeError, OSError) as error:
            raise DataError(f"{name} cannot be read as UTF-8 text: {error}") from None
        examples = [self._parse(line, f"{name}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
        if not examples:
            raise DataError(f"{name} is empty; expected one JSON object a line")
        return examples

    def _parse(self, line: str, where: str) -> Example:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: no valid JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
        prompt = self._column(row, self.prompt_column, "data.prompt_column", where)
        answer = self._column(row, self.answer_column, "data.answer_column", where)
        if self.answer_pattern is not None:
            match = re.search(self.answer_pattern, answer)
            if match is None or match.group(1) is None:
                raise DataError(f"{where}: data.answer_pattern={self.answer_pattern!r} does not match {answer[-60:]!r}")
            answer = match.group(1)
        if not prompt.strip():
            raise DataError(f"{where}: the prompt is empty")
        reserved = {self.prompt_column, self.answer_column, "prompts", "completions", "answer"}
        return Example(prompt, answer, {k: v for k, v in row.items() if k not in reserved})

    @staticmethod
    def _column(row: dict[str, Any], name: str, key: str, where: str) -> str:
        if name not in row:
            raise DataError(f"{where}: there is no column {name!r} ({key}){did_you_mean(name, row)}")
        value = row[name]
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise DataError(f"{where}: column {name!r} holds {type(value).__name__}; expected text or a number")
        return str(value)
