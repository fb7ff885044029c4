"""Checkpoints as the commands find them: of runs that were killed, and damaged ones."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from disturbed import as_if_killed, contents, fail_at, outcome
from helpers import read_json, read_lines, train, write_rewards
from safetensors.torch import load_file

from dppo_cli.cli.main import main
from dppo_cli.training.checkpoint import check
from dppo_cli.training.run_folder import RunFolder

WORDS = ("steps=4", "optim.lr=0.02", "checkpoint.every=1", "checkpoint.keep=3", "reward.path=rewards.py:even")
ADAPTER = "adapter_model.safetensors"

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that was killed after three steps, and an undisturbed one. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny_models["llama3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        assert train(model, *WORDS, "run_dir=undisturbed") == 0
        fail_at(4, RunFolder, "log", patch)
        assert train(model, *WORDS, "run_dir=run") == 130
    as_if_killed(folder / "run")
    assert sorted(path.name for path in (folder / "run/checkpoints").iterdir()) == ["step-1", "step-2", "step-3"]
    return folder


@pytest.fixture
def run(made: Path, work: Path) -> Path:
    """A copy of the run that was killed, in the working folder."""
    return shutil.copytree(made / "run", work / "run")


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


# Reading a run that was killed


@pytest.mark.parametrize(
    ("name", "step"),
    [("run", 3), ("run/checkpoints/step-1", 1), ("run/checkpoints/step-2/", 2)],
)
def test_an_export_takes_the_checkpoint_that_is_named_or_the_newest(
    name: str, step: int, run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("adapter", "merged"):
        assert main(["export", f"run={name}", f"format={form}", f"out={form}"]) == 0
        output = capsys.readouterr().out
        said = "warning: run was not finished; using its checkpoint of step 3"
        assert (said in output) == (name == "run")
        assert f"checkpoints/step-{step}/adapter" in output
    saved = run / f"checkpoints/step-{step}/adapter"
    assert (work / "adapter" / ADAPTER).read_bytes() == (saved / ADAPTER).read_bytes()
    weights, base = load_file(saved / ADAPTER), load_file(next(model_of(run).glob("*.safetensors")))
    layer = "model.layers.1.self_attn.q_proj"
    a, b = (weights[f"base_model.model.{layer}.lora_{letter}.weight"] for letter in "AB")
    merged = load_file(work / "merged/model.safetensors")[f"{layer}.weight"]
    assert (merged - (base[f"{layer}.weight"] + 2 * b @ a)).abs().max() < 1e-6
    others = {(run / f"checkpoints/step-{n}/adapter" / ADAPTER).read_bytes() for n in (1, 2, 3)}
    assert len(others) == 3


def model_of(run: Path) -> Path:
    return Path(
        json.loads((run / "checkpoints/step-1/adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    )


def test_an_evaluation_takes_the_checkpoint_that_is_named_or_the_newest(
    run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples = {}
    for out, name in (("killed", "run"), ("three", "run/checkpoints/step-3"), ("one", "run/checkpoints/step-1")):
        capsys.readouterr()
        assert main(["eval", f"run={name}", f"out={out}", "samples_per_prompt=8"]) == 0
        said = "warning: run was not finished; using its checkpoint of step 3"
        assert (said in capsys.readouterr().out) == (name == "run")
        samples[out] = read_lines(work / out / "samples.jsonl")
    assert samples["killed"] == samples["three"] != samples["one"]


def test_an_evaluation_of_a_checkpoint_of_a_finished_run(made: Path, work: Path) -> None:
    """The last one is the adapter of the end, whose accuracy is known."""
    shutil.copytree(made / "undisturbed", work / "undisturbed")
    assert main(["eval", "run=undisturbed/checkpoints/step-4", "out=out"]) == 0
    after = read_json(work / "undisturbed/summary.json")["eval_after"]
    assert read_json(work / "out/summary.json")["accuracy"] == after


@pytest.mark.parametrize("command", ["eval", "export"])
def test_a_checkpoint_that_is_damaged_or_missing_is_refused(
    command: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoints/step-2/state.json").unlink()
    for step, what in ((2, "is incomplete: it has no state.json"), (9, "points nowhere")):
        assert main([command, f"run=run/checkpoints/step-{step}", "out=out"]) == 2
        assert what in capsys.readouterr().err
    shutil.rmtree(run / "checkpoints")
    assert main([command, "run=run", "out=out"]) == 2
    assert "run=run was not finished, and it has no complete checkpoint" in capsys.readouterr().err


# A damaged checkpoint


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])  # more than the last line break


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = [
    ("state.safetensors", truncate, "is damaged: state.safetensors is not what was written"),
    ("state.safetensors", flip, "is damaged: state.safetensors is not what was written"),
    ("state.json", flip, "is damaged: state.json is not what was written"),
    (f"adapter/{ADAPTER}", Path.unlink, f"is incomplete: it has no adapter/{ADAPTER}"),
    ("manifest.json", truncate, "is incomplete: it has no readable manifest.json"),
    ("manifest.json", Path.unlink, "is incomplete: it has no readable manifest.json"),
]


@pytest.mark.parametrize(("name", "damage", "what"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_used(
    name: str, damage: Callable[[Path], None], what: str, run: Path, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(run / "checkpoints/step-3" / name)
    assert main(["train", "resume=run"]) == 0
    said = f"run/checkpoints/step-3 {what}; using an older checkpoint"
    output = capsys.readouterr().out
    assert f"warning: {said}" in output and "going on after step 2 of 4" in output
    found, expected = outcome(run), outcome(made / "undisturbed")
    assert sorted(found.pop("warnings")) == sorted([*expected.pop("warnings"), said])
    assert found == expected
    # The one that was damaged has been written anew.
    assert contents(run / "checkpoints/step-3/adapter") == contents(made / "undisturbed/checkpoints/step-3/adapter")
    for step in (2, 3, 4):
        check(run / f"checkpoints/step-{step}")


def test_several_damaged_checkpoints(run: Path, made: Path) -> None:
    flip(run / "checkpoints/step-3/state.json")
    (run / "checkpoints/step-2/manifest.json").write_text("[]")
    assert main(["train", "resume=run"]) == 0
    found, expected = outcome(run), outcome(made / "undisturbed")
    assert len(found.pop("warnings")) == len(expected.pop("warnings")) + 2
    assert found == expected


def test_without_a_good_checkpoint_the_run_starts_anew(run: Path, made: Path) -> None:
    for step in (1, 2, 3):
        flip(run / f"checkpoints/step-{step}/state.safetensors")
    assert main(["train", "resume=run"]) == 0
    found, expected = outcome(run), outcome(made / "undisturbed")
    assert found.pop("warnings")[3:] == [
        "the run has no complete checkpoint; it starts anew",
        *expected.pop("warnings"),
    ]
    assert found == expected


def test_a_damaged_checkpoint_does_not_push_out_a_good_one(
    run: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is kept, and that is not the damaged one, although its step is higher."""
    flip(run / "checkpoints/step-3/state.json")
    with monkeypatch.context() as patch:
        fail_at(1, RunFolder, "log", patch)
        assert main(["train", "resume=run", "checkpoint.keep=1"]) == 130
    assert check(run / "checkpoints/step-2")["step"] == 2
    assert main(["train", "resume=run"]) == 0
    found, expected = outcome(run), outcome(made / "undisturbed")
    assert found["metrics"] == expected["metrics"] and found["adapter"] == expected["adapter"]


def test_a_finished_run_without_checkpoints_is_left_alone(
    made: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody has deleted them to save space. Its adapter is all there is."""
    shutil.copytree(made / "undisturbed", work / "run")
    shutil.rmtree(work / "run/checkpoints")
    before = contents(work / "run")
    assert main(["train", "resume=run", "steps=9"]) == 2
    error = capsys.readouterr().err
    assert "run has results but no complete checkpoint" in error and "adapter.path=run/adapter" in error
    assert contents(work / "run") == before


@pytest.mark.parametrize("text", ["{", "7", '{"step": 5}', '{"step": 2, "reward": NaN}', "[" * 100_000])
def test_metrics_that_are_damaged(text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], text, *lines[2:]]) + "\n")
    assert main(["train", "resume=run"]) == 2
    assert "run/metrics.jsonl is damaged: line 2 is not that of step 2" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["checkpoints", "samples"])
def test_nothing_is_written_through_a_link(
    name: str, run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.move(run / name, work / "elsewhere")
    (run / name).symlink_to(work / "elsewhere")
    before = contents(work)
    assert main(["train", "resume=run"]) == 2
    error = f"dppo: run/{name} is a link, and a run writes into its own folder alone; put the folder there\n"
    assert capsys.readouterr().err == error
    assert contents(work) == before


@pytest.mark.parametrize(
    ("name", "text"), [("resumes.json", "[]x"), ("resumes.json", "true"), ("metrics.jsonl", ""), ("metrics.jsonl", "{")]
)
def test_a_resume_that_is_refused_changes_nothing(
    name: str, text: str, made: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not the results of a finished run either, nor the record of resumes."""
    shutil.copytree(made / "undisturbed", work / "run")
    (work / "run" / name).write_text(text)
    before = contents(work / "run")
    assert main(["train", "resume=run", "steps=9"]) == 2
    assert f"run/{name}" in capsys.readouterr().err
    assert contents(work / "run") == before
