"""Rows from JSON, CSV and Parquet files and saved folders: the same problems, and damage in words."""

import csv
import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Json, List, Value
from pyarrow.parquet import write_table
from sources import source

from dppo_cli.data.task import Task
from dppo_cli.errors import DataError
from dppo_cli.types import Example

ROWS: list[dict[str, Any]] = [{"prompt": f"{i}+é=", "answer": f"0{i}", "level": i, "tags": ["x"]} for i in range(4)]


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(path: str, **fields: Any) -> tuple[Task, list[str]]:
    """The task, and what was told."""
    told: list[str] = []
    return source(path=path, **fields).load(told.append), told


def refused(path: str, **fields: Any) -> str:
    with pytest.raises(DataError) as error:
        load(path, **fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def write(path: str, rows: list[dict[str, Any]]) -> None:
    if path.endswith(".parquet"):
        write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.endswith(".csv"):
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.endswith("l.json") or path.endswith(".ndjson"):
        Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.endswith(".json"):
        Path(path).write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")
    else:
        Dataset.from_list(rows).save_to_disk(path)


@pytest.mark.parametrize("path", ["a.json", "l.json", "a.ndjson", "a.PARQUET", "a.parquet", "folder"])
def test_every_format_gives_the_same_problems(path: str) -> None:
    write(path.lower(), ROWS)
    if path != path.lower():
        Path(path.lower()).rename(path)
    task, told = load(path)
    assert [*task.train, *task.heldout] == [Example(row["prompt"], row["answer"], row) for row in ROWS]
    assert (len(task.heldout), told) == (2, [])


def test_csv_cells_are_text() -> None:
    """Read as numbers, 00 would be 0, and an answer would lose its zeros."""
    write("a.csv", [{"prompt": f'"{i}",\nx', "answer": f"0{i}"} for i in range(4)])
    task, _ = load("a.csv")
    assert task.train[0] == Example('"0",\nx', "00", {"prompt": '"0",\nx', "answer": "00"})
    assert [e.answer for e in task.heldout] == ["02", "03"]


def test_reading_leaves_nothing_behind_and_asks_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("asked the network"))
    write("folder", ROWS)
    write("a.parquet", ROWS)
    before = sorted(tmp_path.rglob("*"))
    load("folder")
    load("a.parquet")
    assert sorted(tmp_path.rglob("*")) == before


def test_arithmetic_and_json_lines_do_not_import_the_library() -> None:
    """It takes a second."""
    import subprocess

    code = (
        "import sys, dppo_cli.commands.schemas, dppo_cli.data.hub, dppo_cli.data.mixture, dppo_cli.data.reasoning_gym\n"
    )
    code += "print([name for name in ('datasets', 'reasoning_gym', 'pyarrow') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_saved_folder_with_splits() -> None:
    splits = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list([{**ROWS[0], "prompt": "t"}, ROWS[1]])}
    DatasetDict(splits).save_to_disk("folder")
    task, told = load("folder", eval_split="test", eval_problems=None)
    assert [e.prompt for e in task.train] == ["0+é=", "2+é=", "3+é="]
    assert [e.prompt for e in task.heldout] == ["t", "1+é="]
    assert told == ["1 of 4 training problems of folder, split train are held-out problems, too, and were dropped"]
    assert [e.prompt for e in load("folder", split="test", eval_problems=1)[0].train] == ["t"]
    assert "folder has no split 'tests' (data.split); did you mean 'test'?" in refused("folder", split="tests")
    splits["validation"] = splits.pop("train")
    DatasetDict(splits).save_to_disk("other")
    assert "other has the splits test, validation; choose one: data.split=test" in refused("other")
    write("single", ROWS)
    assert "single is one data set without splits; leave out data.split=train" in refused("single", split="train")
    write("a.json", ROWS)
    assert "a.json is a file, which has no splits; leave out data.eval_split=x" in refused("a.json", eval_split="x")


def test_columns_that_are_no_json_are_left_out_and_told() -> None:
    rows = [
        {**row, "when": datetime(2026, 1, 1), "raw": b"x", "in": {"deep": [b"x"]}, "gap": float("nan"), "none": None}
        for row in ROWS
    ]
    write("a.parquet", rows)
    task, told = load("a.parquet")
    assert task.train[0].columns == {**ROWS[0], "gap": None, "none": None}
    assert told == ["a.parquet: no plain JSON values, so left out: 'when', 'raw', 'in'"]
    assert "row 0: column 'when' holds datetime; expected text, a number" in refused("a.parquet", prompt_column="when")
    assert "row 0: column 'gap' holds nan; expected text or a number" in refused("a.parquet", answer_column="gap")


def test_images_of_a_saved_folder_are_not_decoded_and_json_is() -> None:
    features = Features({"prompt": Value("string"), "answer": Value("string"), "look": Image(), "more": List(Json())})
    rows = [
        {"prompt": f"p{i}", "answer": "a", "look": {"bytes": b"no image", "path": None}, "more": [{"a": i}, [i]]}
        for i in range(4)
    ]
    Dataset.from_list(rows, features=features).save_to_disk("folder")
    task, told = load("folder")
    assert task.train[1].columns == {"prompt": "p1", "answer": "a", "more": [{"a": 1}, [1]]}
    assert told == ["folder: no plain JSON values, so left out: 'look'"]


@pytest.mark.parametrize(
    ("path", "content", "words"),
    [
        ("a.json", b'{"data": [1]}', "a.json, line 1: there is no column 'prompt'"),
        ("a.json", b'{\n"data": [1]}', "a.json holds dict; expected a list of JSON objects, or JSON lines"),
        ("a.json", b"[1, 2]", "a.json, row 0: expected a JSON object, found int"),
        ("a.json", b'[{"prompt": "a"', "a.json: no valid JSON (Expecting"),
        ("a.json", b'[\n{"prompt": "a",}]', "at line 2, column 16)"),
        ("a.json", b'[{"prompt": "\xff"}]', "a.json: it is not UTF-8 text (invalid start byte at byte 14)"),
        ("a.json", '[{"prompt": 1}]'.encode("utf-16"), "a.json, line 1: it is UTF-16 or UTF-32 text"),
        ("a.json", b'[{"prompt": "\\ud800", "answer": 1}]', "a.json, row 0: \\ud800 is half of a surrogate pair"),
        ("a.json", b"[]", "a.json is empty; expected one problem a row"),
        ("a.json", b"[" * 100_000, "a.json: lists and objects are nested more than 100 deep"),
        ("a.csv", b'prompt,answer\na,b\n"a,b\nc,d\n', "a.csv, line 3: no valid CSV (unexpected end of data)"),
        ("a.csv", b'prompt,answer\na,b\n"a"b,c\n', "a.csv, line 3: no valid CSV (',' expected after '\"')"),
        ("a.csv", b"prompt,answer\na,b,c\n", "a.csv, line 2: it has 3 cells, and the header has 2"),
        ("a.csv", b"prompt,prompt\na,b\n", "a.csv, line 1: the header names the column 'prompt' twice"),
        (
            "a.csv",
            b"prompt;answer\na;b\n",
            "a.csv, line 2: there is no column 'prompt' (data.prompt_column): this file has ';' between columns, where "
            "a CSV file has commas",
        ),
        ("a.csv", b"prompt\tanswer\na\tb\n", "(data.prompt_column): this file has '\\t' between columns"),
        ("a.csv", b"prompts;answer\na;b\n", "(data.prompt_column); did you mean 'prompts;answer'?"),
        ("a.csv", b"prompt,answer\n\xff,b\n", "a.csv, after line 0: it is not UTF-8 text"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b"prompt,answer\n", "a.csv is empty; expected one problem a line"),
        ("a.parquet", b"PAR1" + b"x" * 100 + b"PAR1", "a.parquet is damaged, or no Parquet file: "),
        ("a.parquet", b"", "a.parquet is damaged, or no Parquet file: "),
        ("a.xlsx", b"PK", "a.xlsx ends in .xlsx, which says no format; rename it. Known: .jsonl, .ndjson, "),
        ("data", b"{}", "data has no ending, which says no format; rename it. Known: .jsonl"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named(path: str, content: bytes, words: str) -> None:
    Path(path).write_bytes(content)
    assert words in refused(path)


def test_a_parquet_file_that_is_cut_or_changed_in_the_middle() -> None:
    write("a.parquet", [{"prompt": f"{i} {i * 7919}", "answer": "x"} for i in range(5000)])
    whole = Path("a.parquet").read_bytes()
    Path("a.parquet").write_bytes(whole[:-50])
    assert "a.parquet is damaged, or no Parquet file" in refused("a.parquet")
    Path("a.parquet").write_bytes(whole[:1000] + b"\xff" * 400 + whole[1400:])
    assert "a.parquet" in refused("a.parquet")


def test_folders_that_are_no_data_set_or_a_damaged_one() -> None:
    Path("empty").mkdir()
    assert "empty is a folder that `datasets` did not save (save_to_disk); name a file in it: .jsonl" in refused(
        "empty"
    )
    write("folder", ROWS)
    (arrow,) = Path("folder").glob("*.arrow")
    whole = arrow.read_bytes()
    arrow.write_bytes(whole[: len(whole) // 2])
    assert "folder is damaged: " in refused("folder")
    arrow.unlink()
    assert "folder is damaged: " in refused("folder")
    Path("folder/state.json").write_text("{")
    assert "folder is damaged: " in refused("folder")
