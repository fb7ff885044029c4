"""`dppo runs`: the runs below a folder, newest first. Imports no torch, and reads only the ends of long files.

A run folder may be broken in any way, and be written at this moment: what cannot be read is said in its row.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig

from dppo_cli.commands.runs_table import BROKEN, FAILED, FINISHED, KILLED, RUNNING, STOPPED, Row, print_runs
from dppo_cli.config.checks import check_rules
from dppo_cli.config.saved import MAX_BYTES, PLAIN
from dppo_cli.errors import RunError
from dppo_cli.training.lock import LOCK, is_held
from dppo_cli.training.run_folder import BEFORE, METRICS, SUMMARY

CONFIG = "config.yaml"
RECORD = "job.json"
MAX_DEPTH = 3
"""Folders below the one that is named: a sweep's jobs, and sweeps in a folder."""
TAIL = 2**16
"""Bytes of the end of metrics.jsonl that the last step is looked for in."""


@dataclass(frozen=True)
class RunsConfig:
    """Everything `dppo runs` needs."""

    folder: str
    limit: int | None
    json: bool

    def __post_init__(self) -> None:
        check_rules("", self, {"limit >= 1 or null": self.limit is None or self.limit >= 1})


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build."""
    return node


def run_runs(config: RunsConfig, config_yaml: str) -> dict[str, Any]:
    """Print a table, or JSON, and return what JSON holds. Raises RunError if there is no such folder."""
    folder = Path(config.folder)
    if not folder.is_dir():
        hint = "; `dppo train` makes it" if config.folder == "runs" else ""
        raise RunError(f"folder={folder} is not a folder{hint}")
    # Sizes, which take longest, only of those that are shown.
    found = sorted(_found(folder, 0), key=_changed, reverse=True)
    rows = [_row(path) for path in found[: config.limit]]
    listed = [{**asdict(row), "changed": _iso(row.changed)} for row in rows]
    report = {"folder": str(folder), "total": len(found), "runs": listed}
    if config.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        print_runs(folder, rows, len(found))
    return report


def _found(folder: Path, depth: int) -> Iterator[Path]:
    """Run folders, and jobs of sweeps that left no run. Links, such as runs/last, would name one twice."""
    if _is_run(folder) or (depth > 0 and (folder / RECORD).is_file()):
        yield folder
    elif depth < MAX_DEPTH:
        with suppress(OSError):
            inside = [Path(entry.path) for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
            for path in inside:
                if not path.name.startswith("."):
                    yield from _found(path, depth + 1)


def _is_run(folder: Path) -> bool:
    """By its files. An evaluation has a config.yaml, too, but neither metrics nor checkpoints."""
    left = (METRICS, "checkpoints", LOCK)
    return any((folder / name).exists() for name in left) or (
        (folder / CONFIG).is_file() and (folder / "adapter").is_dir()
    )


def _changed(path: Path) -> float:
    times = [0.0]
    for name in (SUMMARY, METRICS, CONFIG, RECORD):
        with suppress(OSError):
            times.append((path / name).stat().st_mtime)
    return max(times)


def _row(path: Path) -> Row:
    problems: list[str] = []
    config = _mapping(path / CONFIG, problems)
    summary = _mapping(path / SUMMARY, problems) if (path / SUMMARY).exists() else None
    record = _mapping(path / RECORD, []) if (path / RECORD).is_file() else {}
    step = _last_step(path / METRICS)
    before, after = (_number((summary or {}).get(f"eval_{when}")) for when in ("before", "after"))
    if summary is not None:
        state = STOPPED if summary.get("interrupted") else FINISHED
        step = _whole(summary.get("steps"), step)
    elif is_held(path):
        state = RUNNING
    elif isinstance(error := record.get("error"), str):
        state, problems = FAILED, [next(iter(error.splitlines()), "")]
    else:
        state = KILLED
    if state != FAILED and problems:
        state = BROKEN
    if summary is None:
        before = _before(path)
    return Row(
        run=str(path),
        state=state,
        step=step,
        steps=_whole(config.get("steps"), None),
        accuracy_before=before,
        accuracy_after=after,
        changed=_changed(path),
        bytes=_size(path),
        model=_text(_section(config, "model").get("path")),
        method=_method(config),
        problem="; ".join(problems) or None,
    )


def _mapping(path: Path, problems: list[str]) -> dict[str, Any]:
    """What a YAML or JSON file holds; empty, with a problem noted, if that is no mapping."""
    try:
        if not path.is_file():
            raise ValueError("is missing" if not path.exists() else "is not a file")
        if path.stat().st_size > MAX_BYTES * (1 if path.name == CONFIG else 64):
            raise ValueError("is too long")
        text = path.read_text(encoding="utf-8")
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        found = yaml.load(text, loader) if path.name == CONFIG else json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("is damaged")
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError, json.JSONDecodeError):
        problems.append(f"{path.name} is damaged")
    except ValueError as error:
        problems.append(f"{path.name} {error}")
    else:
        return {str(key): value for key, value in found.items()}
    return {}


def _last_step(path: Path) -> int | None:
    """Of the last complete line of metrics.jsonl."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL))
            line = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        return _whole(json.loads(line)["step"], None)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _before(path: Path) -> float | None:
    """The first evaluation of a run that has no summary."""
    found = _mapping(path / BEFORE, [])
    if not found:  # An older version left it in the checkpoints alone.
        with suppress(OSError, ValueError):
            steps = [p for p in (path / "checkpoints").iterdir() if p.name.removeprefix("step-").isdecimal()]
            newest = max(steps, key=lambda p: int(p.name.removeprefix("step-")))
            found = dict(_section(_mapping(newest / "state.json", []), "before"))
    return _number(_section(found, "held_out").get("accuracy"))


def _size(path: Path) -> int:
    """Bytes of all files."""
    total, folders = 0, [str(path)]
    while folders:
        with suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    total += entry.stat(follow_symlinks=False).st_size
    return total


def _method(config: Mapping[str, Any]) -> str | None:
    """Example: DPPO TotalVariation TopK 20 GroupMean, QLoRA r=32."""
    names = [
        _text(_section(config, name).get("_target_")) for name in ("objective", "divergence", "approx", "advantage")
    ]
    words = [name.rpartition(".")[2] for name in names if name]
    if (k := _section(config, "approx").get("k")) is not None and len(words) > 2:
        words.insert(3, str(k))
    for part in (_section(config, "region"), _section(config, "filter")):
        if (name := _text(part.get("_target_"))) and name not in PLAIN:
            band = [_text(part.get(key)) or "" for key in ("statistic", "scope")]  # of a filter
            words += [name.rpartition(".")[2], *filter(None, band)]
    adapter = _section(config, "adapter")
    if (r := adapter.get("r")) is not None:
        kind = ("Q" if adapter.get("quantization") else "") + ("DoRA" if adapter.get("use_dora") else "LoRA")
        words.append(f"{kind} r={r}")
    return " ".join(words) or None


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _whole(value: Any, otherwise: int | None) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
