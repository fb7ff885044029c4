"""Where rows come from: JSON lines, JSON, CSV and Parquet files, and folders that the library `datasets` saved.

Reading is local: nothing here asks the network or writes a file.
"""

import csv
import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dppo_cli.config.checks import did_you_mean
from dppo_cli.data.json_rows import MAX_LINE_MIB, Row, has_lines, json_lines, json_list
from dppo_cli.errors import DataError

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
BATCH = 1000
"""Rows that become Python objects at once."""


@dataclass(frozen=True)
class Rows:
    """The rows of a file or a split with their numbers, and how messages name them: "train.jsonl, line 3"."""

    name: str
    unit: str  # "line", counted from 1, or "row", counted from 0
    rows: Iterator[tuple[int, Row]]
    from_text: bool = False  # so every value is plain JSON
    unread: tuple[str, ...] = ()  # columns that are in none of the rows: images, sounds and the like


def file_rows(path: str, split: str | None, split_key: str, default_split: str | None) -> Rows:
    """The rows of a file, by its ending, or of a folder. `split_key`: the option that `split` comes from.

    `default_split`: which of several splits is meant where none is named. Reading it raises DataError for what cannot
    be read.
    """
    if is_folder(path):
        return _folder_rows(path, split, split_key, default_split)
    if split is not None:
        raise DataError(f"{path} is a file, which has no splits; leave out {split_key}={split}")
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        ending_said = f"ends in {ending}" if ending else "has no ending"
        raise DataError(f"{path} {ending_said}, which says no format; rename it. Known: {', '.join(ENDINGS)}")
    if ending == ".csv":
        return Rows(path, "line", _readable(path, _csv(path)), from_text=True)
    if ending == ".parquet":
        return Rows(path, "row", _readable(path, _parquet(path)))
    if ending == ".json" and not _has_lines(path):
        return Rows(path, "row", _readable(path, json_list(path)), from_text=True)
    return Rows(path, "line", _readable(path, json_lines(path)), from_text=True)


def is_folder(path: str) -> bool:
    """Whether it is a folder; raises DataError for what is no file either.

    A pipe could block when it is opened, and a device might never end.
    """
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        raise DataError(f"there is no file {path} (in {Path.cwd()})") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if stat.S_ISDIR(mode):
        return True
    if not stat.S_ISREG(mode):
        raise DataError(f"{path} is not a regular file but a device, a pipe or a socket; write its content to a file")
    return False


def dataset_rows(dataset: Any, name: str) -> Rows:
    """The rows of a `datasets.Dataset`. Images, sounds and the like are never decoded: their columns are left out."""
    unread = [column for column, feature in dataset.features.items() if not _is_plain(feature)]
    table = dataset.remove_columns(unread).with_format(None)

    def rows() -> Iterator[tuple[int, Row]]:
        n = 0
        try:
            for batch in table.iter(BATCH):
                for values in zip(*batch.values(), strict=True):
                    yield n, dict(zip(batch, values, strict=True))
                    n += 1
        except Exception as error:  # Files are opened late, and each format has errors of its own.
            raise DataError(f"{name} is damaged: {in_a_line(error)}") from None

    return Rows(name, "row", rows(), unread=tuple(unread))


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the columns that are no plain JSON values: times, bytes, and the like. NaN is a missing value."""
    return {name: value for name, cell in row.items() if (value := _plain(cell)) is not _NOT_PLAIN}


_NOT_PLAIN = object()


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        inner = [_plain(child) for child in value]
        return _NOT_PLAIN if any(child is _NOT_PLAIN for child in inner) else inner
    if isinstance(value, dict):
        named = {name: _plain(child) for name, child in value.items()}
        fits = all(isinstance(name, str) and child is not _NOT_PLAIN for name, child in named.items())
        return named if fits else _NOT_PLAIN
    return _NOT_PLAIN


def _is_plain(feature: Any) -> bool:
    from datasets import ClassLabel, Json, LargeList, List, Value

    if isinstance(feature, dict):
        return all(map(_is_plain, feature.values()))
    if isinstance(feature, (List, LargeList)):
        return _is_plain(feature.feature)
    return isinstance(feature, (Value, ClassLabel, Json))


def _readable(path: str, rows: Iterator[tuple[int, Row]]) -> Iterator[tuple[int, Row]]:
    try:
        yield from rows
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or in_a_line(error)}") from None


def _has_lines(path: str) -> bool:
    try:
        return has_lines(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _csv(path: str) -> Iterator[tuple[int, Row]]:
    """The rows of a comma-separated file with a header; every cell is text, so 007 stays 007."""
    limit = csv.field_size_limit(MAX_LINE_MIB * 2**20)
    line = 0
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if len(header) != len(set(header)):
                twice = next(name for name in header if header.count(name) > 1)
                raise DataError(f"{path}, line 1: the header names the column {twice!r} twice")
            line = reader.line_num
            for cells in reader:
                n, line = line + 1, reader.line_num  # A row may have several lines.
                if len(cells) == len(header):
                    yield n, dict(zip(header, cells, strict=True))
                elif cells:
                    yield n, DataError(f"it has {len(cells)} cells, and the header has {len(header)}")
    except csv.Error as error:
        raise DataError(f"{path}, line {line + 1}: no valid CSV ({error}); quote cells as Excel does") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, after line {line}: it is not UTF-8 text ({error.reason})") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(path: str) -> Iterator[tuple[int, Row]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    n = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    yield n, row
                    n += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged, or no Parquet file: {in_a_line(error)}") from None


def _folder_rows(path: str, split: str | None, split_key: str, default_split: str | None) -> Rows:
    folder = Path(path)
    if not any((folder / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
        raise DataError(
            f"{path} is a folder that `datasets` did not save (save_to_disk); name a file in it: {', '.join(ENDINGS)}"
        )
    from datasets import Dataset, load_from_disk

    try:
        found = load_from_disk(str(folder.absolute()), keep_in_memory=False)
    except Exception as error:  # Whatever is missing or damaged, and the library has many words for it.
        raise DataError(f"the data set saved in {path} is damaged: {in_a_line(error)}") from None
    if isinstance(found, Dataset):
        if split is not None:
            raise DataError(f"{path} is one data set without splits; leave out {split_key}={split}")
        return dataset_rows(found, path)
    name = chosen_split(list(found), split, split_key, default_split, path)
    return dataset_rows(found[name], f"{path}, split {name}")


def chosen_split(names: list[str], split: str | None, split_key: str, default: str | None, of: str) -> str:
    """The split that is meant. Raises DataError, with those there are, if it does not exist or none is named."""
    if split is None:
        split = default if default in names else names[0] if len(names) == 1 else None
    if split is None:
        raise DataError(f"{of} has the splits {', '.join(names)}; choose one: {split_key}={names[0]}")
    if split not in names:
        raise DataError(f"{of} has no split {split!r} ({split_key}){did_you_mean(split, names)}")
    return split


def in_a_line(error: Exception) -> str:
    """An error of a library in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
