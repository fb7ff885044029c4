"""A sweep (`-m`) as its jobs tell it: each writes job.json into its folder, in whatever process it ran."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from dppo_cli.telemetry.table import RichConsole

RECORD = "job.json"


@dataclass
class JobRecord:
    """How a job ended: its exit status, the error in words or what the command returned."""

    number: int
    overrides: list[str]
    status: int = 0
    error: str | None = None
    summary: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{RECORD}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        temporary.replace(folder / RECORD)


def read_records(sweep_dir: Path) -> list[JobRecord]:
    """The records of a sweep's jobs, by their number."""
    found = [
        JobRecord(**json.loads(p.read_text(encoding="utf-8"))) for p in sweep_dir.glob(f"*/{RECORD}") if p.is_file()
    ]
    return sorted(found, key=lambda record: record.number)


def exit_status(records: Sequence[JobRecord]) -> int:
    """2 if a job ended by a user's mistake, else 1 if any failed, else 0."""
    failed = {record.status for record in records} - {0}
    return 2 if 2 in failed else max(failed, default=0)


def show(records: Sequence[JobRecord], typed: Sequence[str]) -> None:
    """A table: what varied in each job, and what came out. `typed`: words of the command line."""
    words = [record.overrides for record in records]
    same = set.intersection(*map(set, words)) if len(words) > 1 else {word.lstrip("+") for word in typed}
    table = Table(title="sweep")
    for name in ("job", "overrides", "before", "after", "seconds", "folder"):
        table.add_column(name, overflow="fold")
    for record in records:
        varied = " ".join(word for word in record.overrides if word not in same)
        cells = _cells(record.summary) if record.summary else ["-", "-", "-", f"failed: {record.error}"]
        table.add_row(str(record.number), *map(escape, (varied, *cells)))
    RichConsole(highlight=False).print(table)


def failures(records: Sequence[JobRecord]) -> str:
    """The failed jobs in a line."""
    failed = [record for record in records if record.status]
    return f"{len(failed)} of {len(records)} jobs failed; job {failed[0].number}: {failed[0].error}"


def remove_if_empty(sweep_dir: Path) -> None:
    """Remove a sweep's folder if no job left more than the record of its failure."""
    made = {RECORD, "multirun.yaml", "optimization_results.yaml"}
    files = [path for path in sweep_dir.rglob("*") if not path.is_dir()]
    if any(path.name not in made for path in files) or any(record.summary for record in read_records(sweep_dir)):
        return
    for path in files:
        path.unlink(missing_ok=True)
    for folder in [*sorted(sweep_dir.glob("*/"), reverse=True), sweep_dir]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _cells(summary: dict[str, Any]) -> list[str]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    before, after = summary.get("eval_before"), summary.get("eval_after", summary.get("accuracy"))
    folder = summary.get("run_dir", summary.get("out"))
    seconds = summary.get("seconds")
    return [
        percent(before),
        percent(after),
        "-" if seconds is None else f"{seconds:.0f}",
        "" if folder is None else os.path.relpath(folder),
    ]
