"""A disk that refuses the last writes of a run: what is not saved is named, nothing is harmed, and the run goes on."""

import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from disturbed import fail_at, outcome
from ended_runs import FULL, WORDS, write_reward
from helpers import train

from dppo_cli.cli.main import main
from dppo_cli.training.checkpoint import check
from dppo_cli.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("work")


def after_step_3(patch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Do something as soon as the line of step 3 is written."""
    real = RunFolder.log

    def log(folder: RunFolder, metrics: Any) -> None:
        real(folder, metrics)
        if metrics["step"] == 3:
            then()

    patch.setattr(RunFolder, "log", log)


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """`small_files(bytes)`: the system refuses to write longer ones, as it would on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_stays_full(
    model: Path,
    work: Path,
    small_files: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    undisturbed: dict[str, Any],
) -> None:
    """What cannot be saved is named, with the checkpoint there is; nothing that is there is harmed."""
    write_reward(work)
    # An adapter has 20 kB, the state three times as many.
    with monkeypatch.context() as patch:
        after_step_3(patch, lambda: small_files(25_000))
        assert train(model, *WORDS, "run_dir=run", "checkpoint.every=1") == 2
    small_files(resource.RLIM_INFINITY)
    said = capsys.readouterr().err
    assert said.startswith("dppo: run cannot be written any more: ") and said.count("\n") == 1
    assert "the state after step 3 could not be saved (" in said
    assert "); the newest checkpoint is run/checkpoints/step-2. " in said
    assert said.endswith("dppo train resume=run\n")
    for step in (1, 2):
        assert check(work / f"run/checkpoints/step-{step}")["step"] == step
    (work / "broken").unlink()
    assert main(["train", "resume=run"]) == 0
    assert outcome(work / "run") == undisturbed


@pytest.fixture
def read_only(work: Path) -> Iterator[Callable[[], None]]:
    """`read_only()`: from here on the run folder is a read-only mount."""
    run = str(work / "run")
    mounted = []

    def mount() -> None:
        for options in (["--bind"], ["-o", "remount,bind,ro"]):
            done = subprocess.run(["mount", *options, run, run], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"needs the right to mount: {done.stderr.strip()}")
            mounted.append(run)

    yield mount
    if mounted:
        subprocess.run(["umount", run], check=True)


def test_a_mount_that_becomes_read_only(
    model: Path,
    work: Path,
    read_only: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    undisturbed: dict[str, Any],
) -> None:
    write_reward(work)
    with monkeypatch.context() as patch:
        after_step_3(patch, read_only)
        assert train(model, *WORDS, "run_dir=run", "checkpoint.every=1") == 2
    said = capsys.readouterr().err
    assert said.startswith("dppo: run cannot be written any more: Read-only file system; ") and said.count("\n") == 1
    assert "the state after step 3 could not be saved (" in said
    assert (
        "the newest checkpoint is run/checkpoints/step-2. When it can be written again: dppo train resume=run" in said
    )
    (work / "broken").unlink()
    assert main(["train", "resume=run"]) == 2
    assert "Read-only file system" in capsys.readouterr().err
    subprocess.run(["mount", "-o", "remount,bind,rw", str(work / "run")], check=True)
    assert main(["train", "resume=run"]) == 0
    assert outcome(work / "run") == undisturbed


@pytest.mark.parametrize(
    ("call", "name", "after"),
    # The first write is that of the evaluation before training.
    [(1, "save_adapter", False), (1, "save_adapter", True), (2, "write", False)],
)
def test_a_disk_that_is_full_at_the_end(
    call: int,
    name: str,
    after: bool,
    model: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    undisturbed: dict[str, Any],
) -> None:
    write_reward(work)
    with monkeypatch.context() as patch:
        fail_at(call, RunFolder, name, patch, FULL, after=after)
        assert train(model, *WORDS, "run_dir=run") == 2
    (work / "broken").unlink()
    assert main(["train", "resume=run"]) == 0
    assert outcome(work / "run") == undisturbed
