"""Runs that are disturbed, and what must be left of them."""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_json, read_lines, train, train_words

from dppo_cli.training.metrics import COST

WEIGHTS = "adapter/adapter_model.safetensors"

# Forks of a process that has imported everything start at once, and have run nothing before.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["disturbed", "dppo_cli.commands.train", "transformers.models.llama.modeling_llama"])


def outcome(run: Path) -> dict[str, Any]:
    """What a run found, in every bit, without what it cost."""
    summary = read_json(run / "summary.json")
    assert [row["warning"] for row in warned(run)] == summary["warnings"]
    rows = read_lines(run / "metrics.jsonl")
    return {
        "adapter": hashlib.sha256((run / WEIGHTS).read_bytes()).hexdigest(),
        # As text, which is to say in every bit.
        "metrics": [json.dumps({key: value for key, value in row.items() if key not in COST}) for row in rows],
        "masked_tokens": (run / "masked_tokens.json").read_text(encoding="utf-8"),
        "masked_by_mu": (run / "masked_by_mu.json").read_text(encoding="utf-8"),
        "samples": contents(run / "samples"),
        **{key: summary[key] for key in ("eval_before", "eval_after", "steps", "interrupted", "warnings")},
    }


def warned(run: Path) -> list[dict[str, Any]]:
    """What was written of warnings as they occurred."""
    return read_lines(run / "warnings.jsonl") if (run / "warnings.jsonl").exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, apart from the lock, which every process that looks at it opens."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fail_at(
    call: int,
    owner: Any,
    name: str,
    patch: pytest.MonkeyPatch,
    error: BaseException | type[BaseException] = KeyboardInterrupt,
    *,
    after: bool = False,
    until: int | None = None,
) -> None:
    """Raise `error` in the `call`th call of a method or function, or in all up to `until`; `after`: at its end."""
    real, calls = getattr(owner, name), []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        fails = call <= len(calls) <= (until or call)
        if fails and not after:
            raise error
        result = real(*args, **options)
        if fails:
            raise error
        return result

    patch.setattr(owner, name, failing)


def as_if_killed(run: Path) -> None:
    """Take away what a process that was killed did not come to write."""
    (run / "summary.json").unlink()
    (run / "masked_tokens.json").unlink()
    (run / "masked_by_mu.json").unlink()
    shutil.rmtree(run / "adapter")


def start(model: Path, *overrides: str, dies_at: int | None = None) -> BaseProcess:
    """`helpers.train` in a process of its own in the working folder; what it prints is in output.txt and errors.txt.

    `dies_at`: it is killed before it changes the run folder that many times, and one. All changes are counted in the
    file `changes`.
    """
    process = SERVER.Process(target=_train, args=(model, overrides, dies_at))
    process.start()
    return process


def run(model: Path, *overrides: str, dies_at: int | None = None) -> int | None:
    """As `start`, to its end; the exit status, negative for a signal."""
    return wait(start(model, *overrides, dies_at=dies_at))


def wait(process: BaseProcess, seconds: float = 60.0) -> int | None:
    """The exit status of a process."""
    process.join(seconds)
    return process.exitcode


def command(model: Path, *overrides: str) -> list[str]:
    """The same as a command line."""
    return [sys.executable, "-m", "dppo_cli", "train", *train_words(model, *overrides)]


def popen(model: Path, *overrides: str) -> subprocess.Popen[str]:
    """`python -m dppo_cli train ...` in the working folder, with output.txt and errors.txt."""
    with open("output.txt", "w") as output, open("errors.txt", "w") as errors:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return subprocess.Popen(command(model, *overrides), stdout=output, stderr=errors, text=True, env=environment)


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.01)


def _train(model: Path, overrides: tuple[str, ...], dies_at: int | None) -> None:
    for number, name in ((1, "output.txt"), (2, "errors.txt")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    # A shell has what runs in the background ignore SIGINT, which would be inherited.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    torch.set_num_threads(1)
    folder = next(word.partition("=")[2] for word in overrides if word.startswith("run_dir="))
    changes = 0

    def count(event: str, args: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if not (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")):
            return
        if not isinstance(args[0], str | bytes | os.PathLike) or folder not in Path(os.fsdecode(args[0])).parts:
            return
        if changes == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        changes += 1

    sys.addaudithook(count)
    status = train(model, *overrides)
    Path("changes").write_text(str(changes))
    sys.exit(status)
