"""Checkpoints: what is read is what was written, bit for bit, and a crash while writing leaves the older ones."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from checkpoint_cases import snapshot, steps_of, write, write_adapter

from dppo_cli.commands.assembly import make_learner
from dppo_cli.rollout.engine import in_order
from dppo_cli.training import checkpoint
from dppo_cli.training.checkpoint import (
    check,
    checkpoint_path,
    checkpoints,
    installed,
    newest_good,
    read_checkpoint,
    write_checkpoint,
)
from dppo_cli.training.order import Shuffled
from dppo_cli.training.run_folder import RunFolder
from dppo_cli.training.state import RunState, Snapshot


def in_bits(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tuple(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(found: Snapshot, expected: Snapshot) -> None:
    """In every bit."""
    assert {name: in_bits(t) for name, t in found.tensors.items()} == {
        name: in_bits(t) for name, t in expected.tensors.items()
    }
    assert json.dumps(found.plain) == json.dumps(expected.plain)


# Written and read


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = snapshot(12)
    path = write_checkpoint(tmp_path, written, write_adapter, "the config's")
    assert path == tmp_path / "checkpoints/step-12" == checkpoint_path(tmp_path, 12)
    assert_same(read_checkpoint(path), written)


def test_the_state_of_a_run_goes_through_files(train_config: Any, tmp_path: Path) -> None:
    """After an update, so that the optimizer has moments."""
    config = train_config("optim.lr=0.01", "optim.schedule=cosine")

    def new_state() -> RunState:
        policy = make.policy(config)
        return RunState(make_learner(policy, config), Shuffled(make.prompts(policy), config.seed), {})

    state = new_state()
    policy, prompts = state.learner.policy, state.prompts.take(2)
    with config.rollout.load(policy, make.fail) as engine:
        engine.sync(0)
        sampled = in_order(engine.generate(prompts, 2, config.sampling, 0, seed=1))
        groups = make.groups(prompts, sampled, [1.0, -1.0] * 2)
    state.learner.update(groups)
    state.finish_step(0.25)
    written = state.snapshot()
    path = write_checkpoint(tmp_path, written, policy.save_adapter, "the config's")
    found = read_checkpoint(path)
    assert_same(found, written)
    assert any(name.startswith("optimizer.exp_avg_sq.") for name in found.tensors)

    resumed = new_state()
    resumed.load(found)
    assert_same(resumed.snapshot(), written)
    policy.save_adapter(tmp_path / "adapter")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (path / "adapter" / name).read_bytes() == (tmp_path / "adapter" / name).read_bytes()


def test_the_manifest_says_what_a_resume_has_to_know(tmp_path: Path) -> None:
    (path,) = write(tmp_path, 3)
    manifest = checkpoint.check(path)
    assert (manifest["step"], manifest["config_sha256"], manifest["versions"]) == (3, "the config's", installed())
    assert set(manifest["versions"]) == {"dppo", "torch", "transformers", "peft", "bitsandbytes"}
    names = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert names == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "manifest.json",
        "state.json",
        "state.safetensors",
    }


def test_checkpoints_are_in_the_order_of_steps_and_nothing_else_is_one(tmp_path: Path) -> None:
    """Not in the order of names, in which 10 comes before 9."""
    write(tmp_path, 10, 9, 100)
    for name in ("step-x", "step-", "step--1", ".step-11.tmp", "best"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert steps_of(tmp_path) == [9, 10, 100]
    assert newest_good(tmp_path, make.fail) == checkpoint_path(tmp_path, 100)
    assert newest_good(tmp_path / "nowhere", make.fail) is None


# A crash while writing


def fail_at(call: int, real: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """`real`, of which the `call`th call does its work and then raises."""
    calls: list[int] = []

    def failing(*args: Any, **options: Any) -> Any:
        calls.append(1)
        result = real(*args, **options)
        if len(calls) == call:
            raise error
        return result

    return failing


PLACES = [
    ("save_file", checkpoint, 1),
    ("write_json", checkpoint, 1),
    ("write_json", checkpoint, 2),
    ("sync_folder", checkpoint, 1),
    ("fsync", os, 1),
    ("fsync", os, 4),
    ("remove", checkpoint, 1),
]
"""Functions that a write calls, in what module, and which of the calls breaks."""


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "signal"])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]} {place[2]}")
@pytest.mark.parametrize("there", ["nothing", "a damaged one"])
def test_an_interrupted_write_leaves_the_older_checkpoint_and_no_half_one(
    there: str, place: Any, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, owner, call = place
    (older,) = write(tmp_path, 2)
    if there == "a damaged one":
        (damaged,) = write(tmp_path, 4)
        (damaged / "state.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fail_at(call, getattr(owner, name), error))
        with pytest.raises(type(error)):
            write(tmp_path, 4)
    warned: list[str] = []
    assert newest_good(tmp_path, warned.append) == older
    assert len(warned) == len(checkpoints(tmp_path)) - 1
    assert_same(read_checkpoint(older), snapshot(2))
    # The next one is written over what is left.
    (newer,) = write(tmp_path, 4)
    assert newest_good(tmp_path, make.fail) == newer
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-4"]


def test_an_adapter_that_breaks_off_leaves_no_checkpoint(tmp_path: Path) -> None:
    def break_off(path: Path) -> None:
        write_adapter(path)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_checkpoint(tmp_path, snapshot(2), break_off, "the config's")
    assert checkpoints(tmp_path) == []


def test_every_file_is_on_the_disk_before_the_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then the name is synced, too. As far as one can see without cutting the power."""
    events: list[int | str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(handle: int) -> None:
        events.append(os.fstat(handle).st_ino)
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        events.append(target.name)
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    (path,) = write(tmp_path, 2)
    named = events.index("step-2")
    assert {p.stat().st_ino for p in (path, *path.rglob("*"))} <= set(events[:named])
    assert events[named + 1 :] == [path.parent.stat().st_ino]


def test_what_is_left_of_a_write_is_removed_when_the_run_goes_on(tmp_path: Path) -> None:
    write(tmp_path, 2)
    (tmp_path / "checkpoints/.step-4.tmp/adapter").mkdir(parents=True)
    with RunFolder(tmp_path, "", 0, goes_on=True):
        assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_complete_checkpoint_is_not_written_again(tmp_path: Path) -> None:
    """So at no time it is not there."""
    (path,) = write(tmp_path, 2)
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*")}
    assert write_checkpoint(tmp_path, snapshot(2), make.fail, "the config's") == path
    assert {p: p.stat().st_mtime_ns for p in path.rglob("*")} == before


@pytest.mark.parametrize(
    "make_it", [os.mkfifo, Path.touch, lambda path: path.symlink_to("/dev/null")], ids=["pipe", "file", "link"]
)
def test_what_is_in_the_place_of_a_checkpoint_is_moved(make_it: Callable[[Path], None], tmp_path: Path) -> None:
    """It does not end the run, and it is not dppo's to remove."""
    (tmp_path / "checkpoints/step-2-moved-1").mkdir(parents=True)
    make_it(tmp_path / "checkpoints/step-2")
    kind = (tmp_path / "checkpoints/step-2").lstat().st_mode
    (path,) = write(tmp_path, 2)
    assert check(path)["step"] == 2
    assert (tmp_path / "checkpoints/step-2-moved-2").lstat().st_mode == kind
    assert steps_of(tmp_path) == [2]
