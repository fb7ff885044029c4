"""Files that are complete or not there."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

from dppo_cli.training.files import as_count, as_number, parse_json, read_json, remove, write_json


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_file_is_complete_before_it_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The old one stays until the new one is on the disk."""
    write_json(Path("summary.json"), {"steps": 1})

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="No space"):
        write_json(Path("summary.json"), {"steps": 2})
    assert read_json(Path("summary.json")) == {"steps": 1}


def test_a_json_file_is_replaced_and_ends_with_a_line_break() -> None:
    for steps in (1, 2):
        write_json(Path("summary.json"), {"steps": steps})
    assert Path("summary.json").read_text() == '{\n  "steps": 2\n}\n'
    assert [p.name for p in Path().iterdir()] == ["summary.json"]


def test_a_link_is_removed_and_not_what_it_points_to() -> None:
    Path("folder/inside").mkdir(parents=True)
    Path("link").symlink_to("folder")
    Path("file").touch()
    for name in ("link", "file", "not there"):
        remove(Path(name))
    assert [p.name for p in Path().iterdir()] == ["folder"] and Path("folder/inside").is_dir()
    remove(Path("folder"))
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("text", ["NaN", "[1, Infinity]", '{"a": -Infinity}', "{"])
def test_what_is_not_json_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not JSON|Expecting"):
        parse_json(text)
    assert parse_json('{"a": [1e999, null]}')["a"][1] is None


@pytest.mark.parametrize("value", [-1, True, None, 1.0, "1", [], 2**53, 10**30])
def test_what_is_no_count(value: Any) -> None:
    with pytest.raises(ValueError, match="is no count"):
        as_count(value)
    assert (as_count(0), as_count(2**53 - 1), as_count(1, least=1)) == (0, 2**53 - 1, 1)
    with pytest.raises(ValueError, match="0 is no count"):
        as_count(0, least=1)


@pytest.mark.parametrize("value", [True, None, "1", [], math.nan, math.inf, -math.inf, 10**400])
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(ValueError, match="is no number"):
        as_number(value)
    assert as_number(-3) == -3.0 and as_number(0.5) == 0.5


def test_only_files_are_read() -> None:
    """A pipe would be waited for, and a hole of terabytes read."""
    Path("good").write_text('{"a": 1}')
    assert read_json(Path("good")) == {"a": 1}
    os.mkfifo("pipe")
    Path("huge").write_text("{")
    os.truncate("huge", 2**40)
    for name in ("pipe", "huge", "missing", "."):
        with pytest.raises(OSError, match="not a file of a sensible size") as error:
            read_json(Path(name))
        assert error.value.filename == name
