"""Checkpoints of a run: checkpoints/step-N/, each complete or not there.

    adapter/            PEFT's format, for `dppo eval` and `dppo export`
    state.safetensors   adapter, optimizer and random states, as a resume needs them
    state.json          everything else of the state
    manifest.json       size and SHA-256 of every file, versions, hash of the config; and its own SHA-256

A checkpoint is written under another name, synced to the disk and renamed, so a crash leaves the older ones as they
were. No file of a run is pickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dppo_cli.errors import RunError
from dppo_cli.training.files import read_json, sync_folder, write_json
from dppo_cli.training.state import Snapshot

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
KINDS = {"step": int, "config_sha256": str, "versions": dict, "files": dict}
"""What a manifest says."""
VERSIONS = ("dppo", "torch", "transformers", "peft", "bitsandbytes")


def write_checkpoint(run: Path, snapshot: Snapshot, write_adapter: Callable[[Path], None], config_sha256: str) -> Path:
    """Write checkpoints/step-N, if it is not there. `write_adapter` fills a folder with the adapter of `snapshot`."""
    target = checkpoint_path(run, snapshot.plain["step"])
    with suppress(RunError):
        check(target)
        return target
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    write_adapter(temporary / "adapter")
    save_file(snapshot.tensors, temporary / "state.safetensors")
    write_json(temporary / "state.json", snapshot.plain)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {
        "step": snapshot.plain["step"],
        "config_sha256": config_sha256,
        "versions": installed(),
        "files": {str(path.relative_to(temporary)): _fingerprint(path) for path in files},
    }
    write_json(temporary / MANIFEST, {**manifest, "sha256": _digest(manifest)})
    for path in [*files, temporary / MANIFEST]:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    for folder in (temporary / "adapter", temporary):
        sync_folder(folder)
    remove(target)  # a damaged one
    if os.path.lexists(target):  # what is none, and not dppo's
        names = (f"{target.name}-moved-{n}" for n in count(1))
        target.rename(target.with_name(next(n for n in names if not os.path.lexists(target.with_name(n)))))
    temporary.rename(target)
    sync_folder(target.parent)
    return target


def read_checkpoint(path: Path) -> Snapshot:
    """The state in a checkpoint. Raises RunError, naming the file, if it is incomplete or damaged."""
    check(path)
    try:
        tensors = load_file(path / "state.safetensors")
        plain = read_json(path / "state.json")
    except (OSError, ValueError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}") from None
    if not isinstance(plain, dict) or type(plain.get("step")) is not int or plain["step"] != step_of(path):
        raise RunError(f"{path} has the state of another step, or of none")
    return Snapshot(tensors, plain)


def check(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises RunError, naming the file, unless every file is what was written."""
    try:
        manifest: dict[str, Any] = read_json(path / MANIFEST)
        files = manifest["files"]
        expected = {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
        intact = manifest.pop("sha256") == _digest(manifest)
        readable = all(isinstance(manifest[name], kind) for name, kind in KINDS.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        readable = False
    if not readable:
        raise RunError(f"{path} is incomplete: it has no readable {MANIFEST}")
    if not intact:
        raise RunError(f"{path} is damaged: {MANIFEST} is not what was written")
    if manifest["step"] != step_of(path):
        raise RunError(f"{path} is damaged: its {MANIFEST} is of step {manifest['step']}")
    for name, (size, digest) in expected.items():
        file = path / name
        if not file.is_file():
            raise RunError(f"{path} is incomplete: it has no {name}")
        try:
            # The size first: a file that is no longer regular or has grown is not read to its end.
            same = file.stat().st_size == size and _fingerprint(file)["sha256"] == digest
        except OSError as error:
            raise RunError(f"{path} is damaged: {name} cannot be read: {error.strerror}") from None
        if not same:
            raise RunError(f"{path} is damaged: {name} is not what was written")
    return manifest


def newest_good(run: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest complete checkpoint of a run; damaged ones that are newer are named in warnings."""
    for path in reversed(checkpoints(run)):
        try:
            check(path)
        except RunError as error:
            warn(f"{error}; using an older checkpoint")
        else:
            return path
    return None


def installed() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {name: version(name) for name in VERSIONS}


def checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run, complete or not, by step."""
    found = [(step, path) for path in (run / FOLDER).glob("step-*") if (step := step_of(path)) is not None]
    return [path for _, path in sorted(found)]


def checkpoint_path(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step}"


def step_of(path: Path) -> int | None:
    """N of step-N."""
    number = path.name.removeprefix("step-")
    return int(number) if number.isdecimal() else None


def prune(run: Path, step: int, keep: int, also: Sequence[int]) -> None:
    """Remove all checkpoints but the newest `keep` up to `step` and those of the steps in `also`.

    Later ones are damaged: the run went on from one before them.
    """
    kept = [path for path in checkpoints(run) if (step_of(path) or 0) <= step][-keep:]
    for path in checkpoints(run):
        if path not in kept and step_of(path) not in also:
            remove(path)


def remove(path: Path) -> None:
    """A checkpoint; what is no folder, or a link to one, is not dppo's and stays."""
    if path.is_symlink() or not path.is_dir():
        return
    # The manifest first, so that an interrupted removal leaves no checkpoint that seems complete.
    (path / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
