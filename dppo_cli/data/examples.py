"""From rows to problems: which columns are the prompt and the answer, bad rows, and what is held out."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from dppo_cli.config.checks import check_choice, check_rules, did_you_mean
from dppo_cli.data.rows import Rows, plain
from dppo_cli.data.task import Task, Warn
from dppo_cli.errors import ConfigError, DataError
from dppo_cli.types import Example, Messages

NAMED = 10
"""Bad rows whose numbers are told."""
LOOKED_THROUGH = 10_000
"""Rows after the first bad one, for more of them."""
ROLES = ("system", "user", "assistant")
FIELD = re.compile(r"\{([\w.-]+)\}")
"""A column in a prompt template. Other braces are text, as LaTeX has many."""


@dataclass(frozen=True)
class Problems:
    """The options that every source of rows has; conf/data/file.yaml explains them."""

    prompt_column: str | None
    prompt_template: str | None
    answer_column: str | None
    answer_pattern: str | None
    shuffle: int | None
    train_problems: int | None
    eval_problems: int | None
    on_bad_row: str

    @classmethod
    def of(cls, source: Any) -> "Problems":
        """Those of a data option that has them among its own fields. Raises ConfigError if they cannot work."""
        return cls(**{field.name: getattr(source, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        rules = {
            f"{name} >= 1 or null": value is None or value >= 1
            for name, value in (("train_problems", self.train_problems), ("eval_problems", self.eval_problems))
        }
        check_rules("data", self, rules)
        check_choice("data.on_bad_row", self.on_bad_row, ("refuse", "drop"))
        if self.prompt_template is not None and self.prompt_column is not None:
            raise ConfigError(
                f"data.prompt_template makes the prompt, so data.prompt_column={self.prompt_column} would be unused; "
                "add data.prompt_column=null"
            )
        if self.prompt_template is None and self.prompt_column is None:
            raise ConfigError("set data.prompt_column, or data.prompt_template to make the prompt from columns")
        if self.prompt_template is not None and not FIELD.search(self.prompt_template):
            raise ConfigError(
                f"data.prompt_template={self.prompt_template!r} names no column, so all prompts would be the same; "
                "write {column} where its text belongs"
            )
        if self.answer_pattern is not None:
            self._check_pattern(self.answer_pattern)

    def _check_pattern(self, pattern: str) -> None:
        if self.answer_column is None:
            raise ConfigError(f"data.answer_pattern={pattern!r} has no data.answer_column to search in; set it")
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ConfigError(f"data.answer_pattern={pattern!r} is not a regular expression: {error}") from None
        if groups < 1:
            raise ConfigError(f"data.answer_pattern={pattern!r} has no group; put ( ) around the answer")

    def task(self, train: Rows | None, heldout: Rows | None, held_out_by: str, warn: Warn) -> Task:
        """Training problems, and problems of `heldout` or, if None, the last of `train`; no prompt is in both.

        `held_out_by`: the option that names other rows to hold out. Raises DataError for a row that is no problem (or
        warns, as `on_bad_row` says), and if nothing is left to train on.
        """
        if train is None:
            assert heldout is not None
            return Task([], self._read(heldout, warn)[: self.eval_problems])
        examples = self._read(train, warn)
        if heldout is not None:
            held = self._read(heldout, warn)
        else:
            assert self.eval_problems is not None
            if len(examples) <= self.eval_problems:
                raise DataError(
                    f"{train.name} has {len(examples)} problems, and data.eval_problems={self.eval_problems} of them "
                    f"would be held out: none is left to train on; lower it, or set {held_out_by}"
                )
            examples, held = examples[: -self.eval_problems], examples[-self.eval_problems :]
        # Of all that is held out, so that evaluating on more of it later measures no problem that was trained on.
        kept = without(examples, held, train.name, warn)
        return Task(kept[: self.train_problems], held[: self.eval_problems])

    def trained_on(self, rows: Rows, warn: Warn) -> Task:
        """A task that measures the problems it trains on, as the user chose. Raises DataError for a bad row."""
        warn(f"held-out problems are training problems: both are {rows.name}, so accuracy is that of training")
        examples = self._read(rows, warn)
        return Task(examples[: self.train_problems], examples[: self.eval_problems])

    def _read(self, rows: Rows, warn: Warn) -> list[Example]:
        examples: list[Example] = []
        left_out = dict.fromkeys(rows.unread)
        bad: list[int] = []
        first, seen = "", 0
        for n, row in rows.rows:
            if bad and self.on_bad_row == "refuse":
                seen += 1
                if seen > LOOKED_THROUGH or len(bad) == NAMED:
                    break
            try:
                if isinstance(row, DataError):
                    raise row
                columns = row if rows.from_text else plain(row)
                if len(columns) < len(row):
                    left_out.update(dict.fromkeys(name for name in row if name not in columns))
                examples.append(self._example(row, columns))
            except DataError as error:
                first = first or f"{rows.name}, {rows.unit} {n}: {error}"
                bad.append(n)
        if bad:
            others = ", ".join(map(str, bad[1:NAMED])) + (", ..." if len(bad) > NAMED else "")
            # If all are, it is one mistake, such as the name of a column.
            first += f"; bad, too: {rows.unit} {others}" if others and examples else ""
            if self.on_bad_row == "refuse":
                raise DataError(first)
            if not examples:
                raise DataError(f"{rows.name} has no usable row; {len(bad)} were dropped, the first: {first}")
            of = f"{len(bad)} of {len(bad) + len(examples)} rows"
            warn(f"{of} were dropped (data.on_bad_row=drop); the first: {first}")
        if not examples:
            raise DataError(f"{rows.name} is empty; expected one problem a {rows.unit}")
        if left_out:
            warn(f"{rows.name}: no plain JSON values, so left out: {', '.join(map(repr, left_out))}")
        if self.shuffle is not None:
            Random(self.shuffle).shuffle(examples)
        return examples

    def _example(self, row: dict[str, Any], columns: dict[str, Any]) -> Example:
        messages: Messages = ()
        if self.prompt_template is not None:
            prompt = FIELD.sub(lambda field: _inserted(row, field[1]), self.prompt_template)
        else:
            assert self.prompt_column is not None
            value = _value(row, self.prompt_column, "data.prompt_column")
            if isinstance(value, (list, tuple)):
                messages = _messages(value)
                prompt = messages[-1]["content"]
            else:
                prompt = _text(value, self.prompt_column, "text, a number or a list of messages")
        answer = ""
        if self.answer_column is not None:
            answer = self._answer(row)
            if self.answer_column in columns:
                columns[self.answer_column] = answer
        if not prompt.strip():
            raise DataError("the prompt is empty")
        return Example(prompt, answer, columns, messages)

    def _answer(self, row: dict[str, Any]) -> str:
        assert self.answer_column is not None
        value = _value(row, self.answer_column, "data.answer_column")
        answer = _text(value, self.answer_column, "text or a number")
        if self.answer_pattern is not None:
            match = re.search(self.answer_pattern, answer)
            if match is None or match.group(1) is None:
                raise DataError(f"data.answer_pattern={self.answer_pattern!r} does not match {answer[-60:]!r}")
            answer = match.group(1)
        return answer


def without(examples: Sequence[Example], heldout: Sequence[Example], name: str, warn: Warn) -> Sequence[Example]:
    """The examples whose prompt is not held out. Raises DataError if none is."""
    taken = {content(example) for example in heldout}
    kept = [example for example in examples if content(example) not in taken]
    if not kept:
        raise DataError(f"all {len(examples)} training problems of {name} are held-out problems, too; none is left")
    if len(kept) < len(examples):
        dropped = len(examples) - len(kept)
        warn(f"{dropped} of {len(examples)} training problems of {name} are held-out problems, too, and were dropped")
    return kept


def content(example: Example) -> str:
    """What makes two prompts the same."""
    if example.messages:
        return "\n".join(message["content"] for message in example.messages).strip()
    return example.prompt.strip()


def _messages(value: Sequence[Any]) -> list[dict[str, str]]:
    """A conversation that ends before the response that the model is to write. Raises DataError for any other."""
    if not value:
        raise DataError("the list of messages is empty")
    messages = [_message(n, message) for n, message in enumerate(value, 1)]
    if messages[-1]["role"] == "assistant":
        raise DataError("the last message is the assistant's, which is what the model is to write; leave it out")
    return messages


def _message(n: int, message: Any) -> dict[str, str]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
        raise DataError(f"message {n} is no object with the keys role and content")
    role, content = message["role"], message["content"]
    if role not in ROLES:
        raise DataError(f"message {n} has the role {str(role)[:60]!r}; expected {', '.join(ROLES)}")
    if isinstance(content, (list, tuple)):
        texts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content
        ]
        content = None if None in texts else "".join(map(str, texts))
    if not isinstance(content, str):
        raise DataError(f"message {n} holds something else than text; only text can be trained on")
    return {"role": role, "content": content}


def _value(row: Mapping[str, Any], name: str, key: str) -> Any:
    """A column, or what is in it: `reward_model.ground_truth`. Raises DataError if there is none."""
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            # A row may have thousands of columns, and line breaks in their names.
            names = [column[:60] if column[:60].isprintable() else repr(column[:60]) for column in list(row)[:100]]
            hint = did_you_mean(name, names)
            if other := next((mark for mark in ";\t|" if len(row) == 1 and name in next(iter(row)).split(mark)), None):
                hint = f": this file has {other!r} between columns, where a CSV file has commas"
            raise DataError(f"there is no column {name!r} ({key}){hint}")
        found = found[part]
    return found


def _text(value: Any, name: str, expected: str) -> str:
    if not isinstance(value, (str, int, float)) or isinstance(value, bool) or _is_no_number(value):
        held = str(value) if isinstance(value, float) else type(value).__name__
        raise DataError(f"column {name!r} holds {held}; expected {expected}")
    return str(value)


def _is_no_number(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _inserted(row: Mapping[str, Any], name: str) -> str:
    """A column as it stands in a prompt template: lists as JSON."""
    value = _value(row, name, "data.prompt_template")
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return _text(value, name, "text, a number or a list")
