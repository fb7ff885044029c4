"""What the commands that read a run find: a finished run, one that was stopped or killed, one of its checkpoints."""

import json
import shutil
from pathlib import Path
from typing import Any

import make
import pytest
from helpers import read_json, train, write_rewards

from dppo_cli.commands.trained import find_trained, folder_of, read_run_config
from dppo_cli.errors import RunError

REMOVED = "removed"


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 2 and 3. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        assert train(tiny_models["llama3"], "steps=3", "checkpoint.every=2", "run_dir=run") == 0
    return folder / "run"


@pytest.fixture
def run(made: Path, work: Path) -> Path:
    """A copy of it in the working folder."""
    shutil.copytree(made, work / "runs/a")
    return Path("runs/a")


@pytest.fixture
def killed(run: Path) -> Path:
    """The same, as if it had been killed after step 3."""
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    return run


def refused(run: str, match: str) -> None:
    with pytest.raises(RunError, match=match):
        find_trained(run, make.fail)


def test_a_finished_run(run: Path) -> None:
    found = find_trained("runs/a", make.fail)
    assert (found.folder, found.adapter) == (run, run / "adapter")
    assert found.summary == read_json(run / "summary.json")
    assert find_trained("runs/a/", make.fail) == found
    config = read_run_config(run)
    assert (config.steps, config.adapter.r) == (3, 4)


def test_a_run_that_was_stopped_is_told_by_its_summary(run: Path) -> None:
    summary = {**read_json(run / "summary.json"), "interrupted": True, "eval_after": None}
    (run / "summary.json").write_text(json.dumps(summary))
    found = find_trained("runs/a", make.fail)
    assert (found.adapter, found.summary) == (run / "adapter", summary)


def test_of_a_run_that_was_killed_the_newest_checkpoint_is_used(killed: Path) -> None:
    warned: list[str] = []
    found = find_trained("runs/a", warned.append)
    assert (found.folder, found.adapter, found.summary) == (killed, killed / "checkpoints/step-3/adapter", None)
    assert warned == ["runs/a was not finished; using its checkpoint of step 3"]


def test_of_a_run_that_was_killed_the_newest_complete_checkpoint_is_used(killed: Path) -> None:
    (killed / "checkpoints/step-3/state.json").unlink()
    warned: list[str] = []
    assert find_trained("runs/a", warned.append).adapter == killed / "checkpoints/step-2/adapter"
    assert warned == [
        "runs/a/checkpoints/step-3 is incomplete: it has no state.json; using an older checkpoint",
        "runs/a was not finished; using its checkpoint of step 2",
    ]


@pytest.mark.parametrize("name", ["runs/a/checkpoints/step-2", "runs/a/checkpoints/step-2/"])
def test_a_checkpoint_of_a_finished_run(name: str, run: Path) -> None:
    """What the run reached is not what this adapter reached."""
    found = find_trained(name, make.fail)
    assert (found.folder, found.adapter, found.summary) == (run, run / "checkpoints/step-2/adapter", None)
    assert folder_of(name) == run


# Not a run


def test_nothing_there(work: Path) -> None:
    refused("runs/last", "run=runs/last points nowhere; train one with `dppo train`")
    Path("runs/a").mkdir(parents=True)
    refused("runs/b", "run=runs/b points nowhere; there are: runs/a$")
    for name in "cdefg":
        Path("runs", name).mkdir()
    refused("runs/b", "run=runs/b points nowhere; there are: runs/c, runs/d, runs/e, runs/f, runs/g and 1 others$")


def test_a_folder_that_is_no_run(work: Path) -> None:
    Path("runs/a").mkdir(parents=True)
    refused("runs/a", r"run=runs/a is not a run: it has no config\.yaml")
    Path("runs/a/summary.json").write_text("{}")
    refused("runs/a", r"run=runs/a is not a run: it has no config\.yaml")


def test_a_run_without_a_checkpoint(work: Path) -> None:
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/config.yaml").write_text("")
    refused("runs/a", "run=runs/a was not finished, and it has no complete checkpoint")


def test_a_run_that_has_lost_its_adapter(run: Path) -> None:
    (run / "adapter/adapter_config.json").unlink()
    refused("runs/a", r"run=runs/a has lost its adapter: there is no adapter/adapter_config\.json in it")


def test_a_checkpoint_that_is_damaged_or_gone(run: Path) -> None:
    """The one that was named, or none."""
    (run / "checkpoints/step-2/state.json").write_text("{}")
    refused("runs/a/checkpoints/step-2", r"runs/a/checkpoints/step-2 is damaged: state\.json is not what was written")
    refused("runs/a/checkpoints/step-9", "run=runs/a/checkpoints/step-9 points nowhere; there are: runs/a/checkpoints/")


def test_an_adapter_that_the_run_did_not_write(run: Path) -> None:
    """Of the same shape and finite, so nothing else could tell."""
    shutil.copy(run / "checkpoints/step-2/adapter/adapter_model.safetensors", run / "adapter")
    refused("runs/a", r"runs/a/adapter/adapter_model\.safetensors is not what the run wrote")
    (run / "adapter/adapter_model.safetensors").unlink()
    refused("runs/a", r"run=runs/a has lost its adapter: there is no adapter/adapter_model\.safetensors in it")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"steps": 3}', '{"steps": NaN}', "[" * 100_000])
def test_a_summary_that_is_damaged(text: str, run: Path) -> None:
    (run / "summary.json").write_text(text)
    refused("runs/a", r"runs/a/summary\.json is damaged; without it the newest checkpoint is used: delete it")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eval_before", REMOVED),
        ("eval_before", "x"),
        ("eval_before_error", "x"),
        ("eval_after", -0.5),
        ("eval_problems", [1]),
        ("seconds", 1e15),
        ("steps", True),
        ("interrupted", 0),
        ("adapter_sha256", None),
    ],
)
def test_a_summary_that_no_run_writes(key: str, value: Any, run: Path) -> None:
    summary = {**read_json(run / "summary.json"), key: value}
    (run / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if v != REMOVED}))
    refused("runs/a", r"runs/a/summary\.json is damaged; without it the newest checkpoint is used: delete it")


@pytest.mark.parametrize("signature", ["é", "", "0" * 64])
def test_a_config_with_a_signature_of_any_kind(signature: str, run: Path) -> None:
    """It is somebody else's, and names a reward function."""
    text = (run / "config.yaml").read_text().partition("# signature: ")[0]
    (run / "config.yaml").write_text(f"{text}# signature: {signature}\n", encoding="utf-8")
    with pytest.raises(RunError, match=r"names code that would run: reward\.path="):
        read_run_config(run)
