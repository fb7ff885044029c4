"""What the tests of data sources share: a `File` with the options of conf/data/file.yaml."""

from typing import Any

from dppo_cli.data.file import File

OPTIONS: dict[str, Any] = {
    "prompt_column": "prompt",
    "prompt_template": None,
    "answer_column": "answer",
    "answer_pattern": None,
    "shuffle": None,
    "train_problems": None,
    "eval_problems": 2,
    "on_bad_row": "refuse",
}
"""The options that files and sets on the hub share."""


def source(**fields: Any) -> File:
    places = {"path": "train.jsonl", "split": None, "eval_path": None, "eval_split": None}
    return File(**{**places, **OPTIONS, **fields})
