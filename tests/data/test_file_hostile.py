"""Files that hold no JSON lines, or JSON that cannot be trained on: each is refused in one line, at once."""

import json
import os
import pickle
import random
import re
import string
from collections.abc import Callable
from pathlib import Path

import pytest
from sources import source

from dppo_cli.data import json_rows
from dppo_cli.data.task import Task
from dppo_cli.errors import DataError
from dppo_cli.types import Example

GOOD = b'{"prompt": "1+1=", "answer": "2"}'
OTHER = b'{"prompt": "9+9=", "answer": "18"}'
Read = Callable[..., Task]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """The task in a file of these bytes; one problem is held out."""
    monkeypatch.chdir(tmp_path)

    def written(content: bytes, prompt_column: str = "prompt") -> Task:
        (tmp_path / "train.jsonl").write_bytes(content)
        return source(prompt_column=prompt_column, eval_problems=1).load(print)

    return written


def row(prompt: str = '"p"', answer: str = '"a"', more: str = "0") -> str:
    """A line, of values as they stand in the file."""
    return f'{{"prompt": {prompt}, "answer": {answer}, "more": {more}}}'


HALF = r"'?\\ud800'? is half of a surrogate pair, which is no character"
DIGITS = "a number has too many digits; write it as text"
DEEP = "lists and objects are nested more than 100 deep"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (row(prompt=r'"a\ud800"'), HALF),
        (row(answer=r'"\uD800b"'), HALF),
        (row(more=r'{"deep": ["\ud800"]}'), HALF),
        (row(more=r'{"\ud800": 1}'), HALF),
        (row(prompt="1" * 5000), DIGITS),
        (row(more="[" + "1" * 5000 + "]"), DIGITS),
        (row(prompt="[" * 100_000), DEEP),
        (row(more="[" * 100_000 + "]" * 100_000), DEEP),
        (row(more="[" * 500 + "]" * 500), DEEP),
        (row(more='{"a":' * 100 + "0" + "}" * 100), DEEP),
        (row(prompt="NaN"), r"no valid JSON \(NaN is not a JSON number\)"),
        (row(answer="Infinity"), r"no valid JSON \(Infinity is not a JSON number\)"),
        (row(more="[-Infinity]"), r"no valid JSON \(-Infinity is not a JSON number\)"),
        (row(answer="1e999"), "the number 1e999 is too large; write it as text"),
        (row(more="[-1e999]"), "the number -1e999 is too large; write it as text"),
        ("\0" * 20, r"no valid JSON \(Expecting value at column 1\)"),
        (r'{"a\nb": 1, "\ud83d\ude00": 2}', r"no column 'prompt' .*Choices: 'a\\nb', 😀$"),
    ],
)  # fmt: skip
def test_json_that_cannot_be_used_is_refused_in_a_line(read, line, words):
    with pytest.raises(DataError, match=rf"^train\.jsonl, line 2: .*{words}") as error:
        read(b"\n".join([GOOD, line.encode(), GOOD]))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_what_is_only_unusual_is_read(read):
    """Whole pairs, the text of an escape, long integers and moderate nesting reach the reward's process."""
    nested = "[" * 99 + "]" * 99
    lines = [row(r'"\ud83d\ude00 \\ud800"', "9" * 4000, nested), row(more="1e308"), row()]
    task = read("\n".join(lines).encode())
    assert (task.train[0].prompt, task.train[0].answer) == ("😀 \\ud800", "9" * 4000)
    assert task.train[0].columns["more"] == json.loads(nested)
    assert pickle.loads(pickle.dumps(task.train)) == task.train


@pytest.mark.parametrize("name", ["self", "function", "", "not a name", "lambda", "pairs"])
def test_a_column_may_have_any_name(read, name):
    columns = {"prompt": "p", "answer": "a", "completions": 1, name: 2}
    assert read(json.dumps(columns).encode() + b"\n" + GOOD).train == [Example("p", "a", columns)]


def test_a_message_about_a_row_of_many_columns_stays_readable(read):
    line = json.dumps({f"column {i}" * 20: i for i in range(10_000)}).encode()
    with pytest.raises(DataError, match=r"there is no column 'prompt'") as error:
        read(line)
    assert len(str(error.value)) < 7000


def test_a_byte_order_mark_is_no_text(read):
    """Windows editors write one; two such files put together have one in the middle."""
    mark = b"\xef\xbb\xbf"
    task = read(mark + GOOD + b"\r\n" + mark + OTHER + b"\n")
    assert [(e.prompt, e.answer) for e in [*task.train, *task.heldout]] == [("1+1=", "2"), ("9+9=", "18")]
    with pytest.raises(DataError, match="is empty"):
        read(mark)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_another_encoding_is_named(read, encoding):
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: it is UTF-16 or UTF-32 text; convert it: iconv"):
        read((GOOD + b"\n" + GOOD).decode().encode(encoding))


def test_a_line_that_is_not_text_is_named(read):
    with pytest.raises(DataError, match=r"line 2: it is not UTF-8 text \(invalid start byte at byte 3\)$"):
        read(GOOD + b"\n{\x22\xff\x22}")


def test_what_is_no_file_is_named_and_never_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.jsonl").mkdir()
    os.mkfifo("pipe")
    for name, words in [
        (
            "folder.jsonl",
            r"folder\.jsonl is a folder that `datasets` did not save \(save_to_disk\); name a file in it: \.jsonl",
        ),
        ("pipe", "pipe is not a regular file but a device, a pipe or a socket"),
        ("/dev/null", "/dev/null is not a regular file"),
        ("/dev/zero", "/dev/zero is not a regular file"),
        ("pipe/below", "there is no file pipe/below"),
        ("n" * 300, "cannot be read: File name too long"),
        ("zero\0", "there is no file"),
    ]:
        with pytest.raises(DataError, match=words):
            source(path=name).load(print)


def test_a_file_that_is_one_long_line_is_not_read_to_its_end(read, monkeypatch):
    monkeypatch.setattr(json_rows, "MAX_LINE_MIB", 1)
    longest = row(prompt='"' + "x" * (2**20 - len(row('""')) - 1) + '"').encode() + b"\n"
    assert len(longest) == 2**20
    assert len(read(longest + GOOD).train[0].prompt) > 1_000_000
    with pytest.raises(DataError, match=r"line 2: it is longer than 1 MiB; expected one JSON object a line"):
        read(GOOD + b"\n " + longest + GOOD)


def test_whatever_is_in_a_file_the_error_is_a_line(read):
    """Damaged JSON lines, from random bytes to good lines with a few characters changed."""
    dice = random.Random(0)
    pieces = [
        *string.printable,
        *"é😀\u2028\0\ufeff",
        r"\ud83d",
        r"\ude00",
        "NaN",
        "1e400",
        "[" * 60,
        "{}",
        "null",
        '"prompt":',
    ]
    errors = []
    for trial in range(1500):
        line = list(row(r'"a\u00e9"', "-1.5", '[{"x": null}, 1e3]'))
        for _ in range(dice.randrange(trial % 5 + 1)):
            line[dice.randrange(len(line))] = dice.choice(pieces)
        content = "".join(line).encode() if trial % 3 else dice.randbytes(dice.randrange(1, 60))
        found = read_or_refuse(read, GOOD + b"\n" + content + b"\n" + OTHER)
        if isinstance(found, DataError):
            errors.append(str(found))
        else:
            columns = [[e.prompt, e.answer, e.columns] for e in found.train]
            json.dumps(columns, ensure_ascii=False, allow_nan=False).encode()
    assert 500 < len(errors) < 1500
    assert [e for e in errors if not e.isprintable() or not re.match(r"train\.jsonl, line [23]: ", e)] == []


def read_or_refuse(read: Read, content: bytes) -> Task | DataError:
    try:
        return read(content)
    except DataError as error:
        return error
