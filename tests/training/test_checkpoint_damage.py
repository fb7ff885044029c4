"""Damaged checkpoints: each kind is recognised and named, and the one before it is used. Nothing is unpickled."""

import hashlib
import json
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from checkpoint_cases import write_adapter
from helpers import TINY_RUN, read_json
from safetensors import safe_open

from dppo_cli.cli.main import main
from dppo_cli.errors import RunError
from dppo_cli.training import checkpoint
from dppo_cli.training.checkpoint import _digest, check, newest_good, read_checkpoint, write_checkpoint
from dppo_cli.training.state import Snapshot


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 2 and 4."""
    for step in (2, 4):
        snapshot = Snapshot({"a": torch.arange(100.0) + step}, {"step": step, "text": "x" * 100})
        write_checkpoint(tmp_path / "run", snapshot, write_adapter, "the config's")
    return tmp_path / "run"


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def truncate(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def empty(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


def append(path: Path, content: bytes) -> None:
    path.write_bytes(path.read_bytes() + content)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def say(path: Path, **changes: Any) -> None:
    """Have a manifest say something else, under the right hash; None: leave it out."""
    manifest = {**json.loads(path.read_text()), **changes}
    manifest = {name: value for name, value in manifest.items() if value is not None and name != "sha256"}
    path.write_text(json.dumps({**manifest, "sha256": _digest(manifest)}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "incomplete: it has no readable manifest.json"),
    "a torn manifest": (lambda c: truncate(c / "manifest.json", 40), "incomplete: it has no readable manifest.json"),
    "garbage": (lambda c: (c / "manifest.json").write_text("{oops"), "incomplete: it has no readable manifest.json"),
    "zeros": (lambda c: (c / "manifest.json").write_bytes(bytes(99)), "incomplete: it has no readable manifest.json"),
    "no text": (lambda c: (c / "manifest.json").write_bytes(b"\xff"), "incomplete: it has no readable manifest.json"),
    "a list": (lambda c: (c / "manifest.json").write_text("[]"), "incomplete: it has no readable manifest.json"),
    "no files": (lambda c: (c / "manifest.json").write_text("{}"), "incomplete: it has no readable manifest.json"),
    "no hash": (lambda c: say(c / "manifest.json", config_sha256=None), "incomplete: it has no readable manifest.json"),
    "a pipe": (lambda c: replace_by_pipe(c / "manifest.json"), "incomplete: it has no readable manifest.json"),
    "endless": (
        lambda c: say(c / "manifest.json", files={"state.json": {"bytes": math.inf, "sha256": ""}}),
        "incomplete: it has no readable manifest.json",
    ),
    "a list of versions": (lambda c: say(c / "manifest.json", versions=[]), "incomplete: it has no readable manifest."),
    "of another step": (lambda c: say(c / "manifest.json", step=7), "damaged: its manifest.json is of step 7"),
    "an empty folder": (empty, "incomplete: it has no readable manifest.json"),
    "truncated": (lambda c: truncate(c / "state.safetensors", 200), "damaged: state.safetensors is not what was wr"),
    "grown": (lambda c: append(c / "state.safetensors", b"0"), "damaged: state.safetensors is not what wa"),
    "flipped": (lambda c: flip(c / "state.safetensors", -30), "damaged: state.safetensors is not what was written"),
    "header": (lambda c: flip(c / "state.safetensors", 3, 7), "damaged: state.safetensors is not what was written"),
    "flipped text": (lambda c: flip(c / "state.json", 30), "damaged: state.json is not what was written"),
    "garbage text": (lambda c: (c / "state.json").write_text("{oops"), "damaged: state.json is not what was written"),
    "no state": (lambda c: (c / "state.json").unlink(), "incomplete: it has no state.json"),
    "no tensors": (lambda c: (c / "state.safetensors").unlink(), "incomplete: it has no state.safetensors"),
    "a folder": (lambda c: replace_by_folder(c / "state.json"), "incomplete: it has no state.json"),
    "adapter": (lambda c: flip(c / "adapter/adapter_model.safetensors", 0), "damaged: adapter/adapter_model.safetens"),
    "no adapter": (lambda c: empty(c / "adapter"), "incomplete: it has no adapter/adapter_config.json"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_the_older_one_is_used(damage: Callable[[Path], Any], says: str, run: Path) -> None:
    newer = run / "checkpoints/step-4"
    assert newest_good(run, make.fail) == newer
    damage(newer)
    warned: list[str] = []
    assert newest_good(run, warned.append) == run / "checkpoints/step-2"
    (text,) = warned
    assert text.startswith(f"{newer} is {says}") and text.endswith("; using an older checkpoint")
    with pytest.raises(RunError, match=says):
        read_checkpoint(newer)
    # And where both are damaged there is none.
    damage(run / "checkpoints/step-2")
    assert newest_good(run, warned.append) is None
    assert [str(text).partition(" is ")[0][-6:] for text in warned] == ["step-4", "step-4", "step-2"]


@pytest.mark.parametrize("name", ["adapter/adapter_config.json", "manifest.json", "state.json", "state.safetensors"])
def test_no_flipped_bit_goes_unnoticed(name: str, run: Path) -> None:
    path = run / "checkpoints/step-4" / name
    content = path.read_bytes()
    for position in range(len(content)):
        flip(path, position, bit=position % 8)
        with pytest.raises(RunError):
            check(run / "checkpoints/step-4")
        path.write_bytes(content)
    check(run / "checkpoints/step-4")


def test_a_left_over_of_a_write_is_no_checkpoint(run: Path) -> None:
    (run / "checkpoints/step-4").rename(run / "checkpoints/.step-4.tmp")
    assert newest_good(run, make.fail) == run / "checkpoints/step-2"


def test_a_file_that_the_disk_does_not_give_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(hashlib, "file_digest", broken)
    with pytest.raises(RunError, match=r"step-4 is damaged: \S+ cannot be read: Input/output error"):
        check(run / "checkpoints/step-4")


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_what_was_written_wrongly_is_an_error_in_words(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checksums are right, and the content is not what it should be."""
    monkeypatch.setattr(checkpoint, "check", lambda path: {})
    (run / "checkpoints/step-4" / name).write_bytes(b"{oops")
    with pytest.raises(RunError, match="step-4 cannot be read: "):
        read_checkpoint(run / "checkpoints/step-4")


@pytest.mark.parametrize("state", ["[]", "{}", "1", '{"step": -1}', '{"step": 2}', '{"step": "4"}', '{"step": 4.0}'])
def test_the_state_is_of_the_step_that_the_folder_is_named_for(
    state: str, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps would be done again, and be in metrics.jsonl twice."""
    monkeypatch.setattr(checkpoint, "check", lambda path: {})
    (run / "checkpoints/step-4/state.json").write_text(state)
    with pytest.raises(RunError, match="step-4 has the state of another step, or of none"):
        read_checkpoint(run / "checkpoints/step-4")


# No pickle


def forbid_pickle(patch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("pickle")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        patch.setattr(pickle, name, forbidden)
    for name in ("save", "load"):
        patch.setattr(torch, name, forbidden)


def test_nothing_is_pickled_in_a_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        forbid_pickle(patch)
        with pytest.raises(AssertionError, match="pickle"):
            torch.save({}, tmp_path / "file")
        snapshot = read_checkpoint(run / "checkpoints/step-4")
        write_checkpoint(tmp_path / "other", snapshot, write_adapter, "the config's")
        again = read_checkpoint(tmp_path / "other/checkpoints/step-4")
    assert torch.equal(again.tensors["a"], snapshot.tensors["a"]) and again.plain == snapshot.plain


def test_nothing_is_pickled_in_a_run_and_its_resume(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a KL term, so that every sample is trained on although no answer is right."""
    words = [*TINY_RUN, f"model.path={model}", "data.train_problems=32", "kl_to_reference=0.1", "checkpoint.every=1"]
    assert main(["train", *words, "run_dir=first"]) == 0, "whatever the libraries load late is loaded"
    with monkeypatch.context() as patch:
        forbid_pickle(patch)
        assert main(["train", *words, "run_dir=run"]) == 0
        assert main(["train", "resume=run", "steps=3"]) == 0
        assert main(["eval", "run=run/checkpoints/step-3", "out=result"]) == 0
    assert read_json(work / "run/summary.json")["steps"] == 3
    files = [path for path in (work / "run").rglob("*") if path.is_file()]
    assert {path.name.rpartition(".")[2] for path in files} == {"lock", "yaml", "jsonl", "json", "safetensors", "md"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as opened:
                assert list(opened.keys())
        elif path.suffix == ".json":
            json.loads(path.read_text())
