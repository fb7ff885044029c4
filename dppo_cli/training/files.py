"""Files that are complete or not there, whatever happens while they are written."""

import errno
import json
import math
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        # On a full disk what was written so far takes room.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


LONGEST = 2**30
"""Bytes of a JSON file."""


def read_json(path: Path) -> Any:
    """What a JSON file holds. Raises OSError for what is no file or too long, and ValueError for what is not JSON.

    A pipe would be waited for, and a file of terabytes, which takes no room on the disk, be read into memory.
    """
    if not path.is_file() or path.stat().st_size > LONGEST:
        raise OSError(errno.EINVAL, "not a file of a sensible size", str(path))
    return json.loads(path.read_text(encoding="utf-8"))


def sync_folder(path: Path) -> None:
    """Have the system write a folder's names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, complete or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def finite(value: Any) -> Any:
    """None in the place of every number in mappings that is not finite, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: finite(child) for key, child in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: str) -> Any:
    """Raises ValueError for NaN and Infinity, too, which Python's json reads."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def as_count(value: Any, least: int = 0) -> int:
    """A count that was read from JSON. Raises ValueError for anything else, and below `least`."""
    if type(value) is not int or not least <= value < 2**53:
        raise ValueError(f"{value!r:.100} is no count")
    return value


def as_number(value: Any) -> float:
    """A finite number that was read from JSON. Raises ValueError for anything else."""
    if type(value) not in (int, float) or not abs(value) < 2**53:
        raise ValueError(f"{value!r:.100} is no number")
    return float(value)


def remove(path: Path) -> None:
    """A file, a folder with all that is in it, or a link; nothing if it is not there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
