"""A run's folder: config.yaml, metrics.jsonl (a line per step), summary.json, masked_tokens.json, adapter/,
checkpoints/step-N/.

It appears on the disk only when everything that can be refused has been checked and loaded, and goes away again if the
run ends by a user's mistake before its first step.
"""

import json
import os
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from dppo_cli.errors import RunError

SPARE_BYTES = 64 * 2**20
"""Room for logs and metrics beside the adapters."""


def default_run_dir(parent: str) -> Path:
    """parent/<date>_<time>, with a counter where that second is taken."""
    base = Path(parent) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    path, n = base, 1
    while path.exists():
        n += 1
        path = base.with_name(f"{base.name}_{n}")
    return path


def check_free(path: Path, key: str) -> None:
    """Raise RunError if `path`, which the user set as `key`, holds a run, is not a folder, or could not be written."""
    if path.exists() and not path.is_dir():
        raise RunError(f"{key}={path} is a file; name a new folder")
    if path.is_dir() and any(path.iterdir()):
        holds = {"config.yaml": "already holds a run", "multirun.yaml": "already holds a sweep"}
        what = next((text for name, text in holds.items() if (path / name).exists()), "is not empty")
        raise RunError(f"{key}={path} {what}; name a new folder, or delete it first")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise RunError(f"{key}={path} cannot be written: {parent} is a file; choose another {key}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(f"{key}={path} cannot be written: no permission in {parent}; choose another {key}")


def check_disk(path: Path, needed_bytes: int) -> None:
    """Raise RunError unless the disk under `path` has that much room."""
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise RunError(
            f"{path} needs {needed_bytes / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB free; choose another "
            "place, or delete something"
        )


class RunFolder:
    """Writes a run. Use as a context: a user's mistake before the first logged step removes the folder again."""

    def __init__(
        self, path: Path, config_yaml: str, write_adapter: Callable[[Path], None], adapter_bytes: int, adapters: int
    ) -> None:
        """`write_adapter` fills a folder with the adapter as it is; room for `adapters` of them is checked."""
        check_free(path, "run_dir")
        check_disk(path, adapter_bytes * adapters + SPARE_BYTES)
        self.path, self.write_adapter, self.steps_logged = path, write_adapter, 0
        self.config_yaml = config_yaml

    def __enter__(self) -> "RunFolder":
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "config.yaml").write_text(self.config_yaml, encoding="utf-8")
        except OSError as error:
            raise RunError(f"run_dir={self.path} cannot be written: {error.strerror}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if kind is not None and self.steps_logged == 0:
            shutil.rmtree(self.path, ignore_errors=True)
        if isinstance(error, OSError):
            raise RunError(f"{self.path} cannot be written any more: {error.strerror or error}") from error

    def log(self, metrics: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; an OSError ends the run in words."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        self.steps_logged += 1
        if self.steps_logged == 1:
            point_last(self.path)

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        write_json(self.path / name, content)

    def save_adapter(self, name: str) -> Path:
        """Write the adapter to `name` below the run folder, whole or not at all."""
        target = self.path / name
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        self.write_adapter(temporary)
        temporary.replace(target)
        return target


def write_json(path: Path, content: Any) -> None:
    """Write a file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def point_last(run: Path) -> None:
    """Make runs/last, in the working directory, point at `run`. Does nothing on a file system without links."""
    link = Path("runs/last")
    temporary = link.with_name(f".last-{os.getpid()}")
    try:
        link.parent.mkdir(exist_ok=True)
        temporary.symlink_to(os.path.relpath(run, link.parent))
        temporary.replace(link)
    except OSError:
        temporary.unlink(missing_ok=True)


def open_run(run: str) -> Path:
    """The folder of a finished run. Raises RunError, naming what is there, if it is not one."""
    path = Path(run)
    if not path.is_dir():
        near = [str(p) for p in sorted(path.parent.glob("*")) if p.is_dir()] if path.parent.is_dir() else []
        known = f"; there are: {', '.join(near[-5:])}" if near else "; train one with `dppo train`"
        raise RunError(f"run={run} points nowhere{known}")
    for name in ("config.yaml", "summary.json", "adapter/adapter_config.json"):
        if not (path / name).is_file():
            raise RunError(f"run={run} is not a finished run: it has no {name}")
    return path
