"""Problems from a file of your own, or from a folder that the library `datasets` saved."""

import os
from dataclasses import dataclass

from dppo_cli.config.build import FilePath
from dppo_cli.data.examples import Problems
from dppo_cli.data.rows import file_rows
from dppo_cli.data.task import Task, Warn
from dppo_cli.errors import ConfigError


@dataclass(frozen=True)
class File:
    """A file of JSON lines, JSON, CSV or Parquet, or a saved folder; conf/data/file.yaml explains the fields."""

    path: FilePath | None
    split: str | None
    eval_path: FilePath | None
    eval_split: str | None
    prompt_column: str | None
    prompt_template: str | None
    answer_column: str | None
    answer_pattern: str | None
    shuffle: int | None
    train_problems: int | None
    eval_problems: int | None
    on_bad_row: str

    def __post_init__(self) -> None:
        Problems.of(self)
        if self.path is None and self.eval_path is None:
            raise ConfigError(
                "data.path and data.eval_path are null; set data.path to train, data.eval_path to evaluate"
            )
        if self.eval_path is None and self.eval_split is None and self.eval_problems is None:
            raise ConfigError("set data.eval_path, or data.eval_problems to hold out that many problems of data.path")

    def load(self, warn: Warn) -> Task:
        """Read the problems. Raises DataError for what cannot be read as the options say."""
        problems, other = Problems.of(self), self.eval_path or self.path
        assert other is not None
        train = heldout = None
        if self.path is not None:
            train = file_rows(self.path, self.split, "data.split", default_split="train")
        if self.eval_path is not None or self.eval_split is not None:
            heldout = file_rows(other, self.eval_split, "data.eval_split", default_split="test")
        if train is not None and heldout is not None and self.path is not None:
            same_split = train.name.removeprefix(self.path) == heldout.name.removeprefix(other)
            if same_split and os.path.samefile(self.path, other):
                return problems.trained_on(train, warn)
        return problems.task(train, heldout, "data.eval_path", warn)
