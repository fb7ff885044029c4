"""The reader of runs: what it finds, in runs that ended, were killed, are of a sweep, or damaged."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import read_json, read_lines, train_words, write_rewards

import dppo_cli
from dppo_cli.cli.main import main
from dppo_cli.errors import RunError
from dppo_cli.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run` and `sweep`. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        words = train_words(tiny_models["llama3"], "samples.every=2", "steps=3")
        assert main(["train", *words, "run_dir=run"]) == 0
        assert main(["train", "-m", *words, "run_dir=sweep", "steps=1", "sampling.temperature=0,1"]) == 2
    return folder


@pytest.fixture
def run(made: Path, work: Path) -> Path:
    """A copy of the run in the working folder."""
    shutil.copytree(made / "run", work / "run")
    return Path("run")


def refused(match: str) -> None:
    with pytest.raises(RunError, match=match):
        dppo_cli.open_run("run")


def test_a_run(run: Path) -> None:
    found = dppo_cli.open_run("run")
    assert found.path == run and found.problems == []
    assert found.config["steps"] == 3 and found.config["adapter"]["r"] == 4
    assert found.summary == read_json(run / "summary.json")
    assert found.masked_tokens == read_json(run / "masked_tokens.json")
    assert [row["step"] for row in found.metrics] == [1, 2, 3] and found.metrics == read_lines(run / "metrics.jsonl")
    assert found.sample_steps == [1, 2, 3]
    samples = found.samples(2)
    assert samples == read_lines(run / "samples/step-2.jsonl")
    assert [(row["step"], row["sample"]) for row in samples] == [(2, g) for g in range(4)] * 2


def test_a_frame_has_a_row_for_each_step(run: Path) -> None:
    frame = dppo_cli.open_run(run).frame()
    assert frame["step"].tolist() == [1, 2, 3]
    assert frame["time.rollout"].tolist() == [row["time"]["rollout"] for row in read_lines(run / "metrics.jsonl")]
    assert "time" not in frame.columns


def test_what_a_frame_needs_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(RunError, match=r"^frame\(\) needs the package pandas: pip install pandas$"):
        dppo_cli.open_run(run).frame()


def test_a_run_that_is_going_on(run: Path) -> None:
    for name in ("summary.json", "masked_tokens.json"):
        (run / name).unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    found = dppo_cli.open_run("run")
    assert (found.summary, found.masked_tokens, len(found.metrics)) == (None, None, 3)
    assert found.warnings == []
    assert found.problems == [
        "run/metrics.jsonl: the last line is not complete and was left out; the run was killed, or still writes"
    ]
    (run / "metrics.jsonl").unlink()
    assert dppo_cli.open_run("run").metrics == []


def test_the_warnings_so_far(run: Path) -> None:
    """Those of the summary once there is one."""
    (run / "warnings.jsonl").write_text('{"warning": "one"}\n[2]\n{"warning": "three"}\n{"warning": "fo')
    assert dppo_cli.open_run("run").warnings == read_json(run / "summary.json")["warnings"]
    (run / "summary.json").unlink()
    found = dppo_cli.open_run("run")
    assert found.warnings == ["one", "three"]
    assert found.problems == ["run/warnings.jsonl is damaged: line 2 is not a JSON object; it was left out"]


def test_a_value_of_the_environment_is_not_asked_for(run: Path) -> None:
    with (run / "config.yaml").open("a") as file:
        file.write("more: ${oc.env:HOME}\n")
    assert dppo_cli.open_run("run").config["more"] == "${oc.env:HOME}"


def test_samples_that_are_not_there(run: Path) -> None:
    with pytest.raises(RunError, match=r"^run has no samples of step 7, but of 1, 2, 3$"):
        dppo_cli.open_run("run").samples(7)
    # As an older version leaves a run.
    shutil.rmtree(run / "samples")
    found = dppo_cli.open_run("run")
    assert found.sample_steps == []
    with pytest.raises(RunError, match=r"^run has no samples: samples.every was 0, or an older version trained it$"):
        found.samples(1)


def test_files_that_are_damaged(run: Path) -> None:
    metrics = (run / "metrics.jsonl").read_text()
    for line in ("{", "[1]", "[" * 100_000, ""):
        (run / "metrics.jsonl").write_text(f"{line}\n{metrics}")
        refused(r"^run/metrics.jsonl is damaged: line 1 is not a JSON object$")
    (run / "metrics.jsonl").write_bytes(b"\xff\n")
    refused(r"^run/metrics.jsonl is damaged: it is not UTF-8 text$")
    (run / "metrics.jsonl").write_text(metrics)
    (run / "samples/step-2.jsonl").write_text("{}\n{}\n{")
    with pytest.raises(RunError, match=r"^run/samples/step-2.jsonl is damaged: line 3 is not a JSON object$"):
        dppo_cli.open_run("run").samples(2)
    (run / "masked_tokens.json").write_text("{}")
    refused(r"^run/masked_tokens.json is damaged: it is not a JSON list$")
    (run / "summary.json").write_text("x")
    refused(r"^run/summary.json is damaged: it is not a JSON object$")
    (run / "config.yaml").write_text("a: [")
    refused(r"^run/config.yaml is no YAML: ")


def test_folders_that_are_no_run(work: Path, made: Path) -> None:
    refused("^run is not there$")
    Path("run").write_text("")
    refused("^run is not a folder$")
    Path("run").unlink()
    Path("run").mkdir()
    refused(r"^run is not a run: it has no config.yaml$")
    with pytest.raises(RunError, match=r"^run is not a sweep: there is no run in a folder of it$"):
        dppo_cli.open_sweep("run")
    with pytest.raises(RunError, match=r"sweep is a sweep; dppo_cli.open_sweep\('\S+/sweep'\) reads all of its runs$"):
        dppo_cli.open_run(made / "sweep")
    with pytest.raises(RunError, match=r"run is a run; dppo_cli.open_run\('\S+/run'\) reads it$"):
        dppo_cli.open_sweep(str(made / "run"))


def test_a_sweep(made: Path, tmp_path: Path) -> None:
    failed, done = dppo_cli.open_sweep(made / "sweep")
    assert (failed.number, done.number) == (0, 1)
    assert failed.run is None and failed.error is not None and failed.error.startswith("sampling.temperature=0 is gree")
    assert done.error is None and done.overrides is not None and "sampling.temperature=1" in done.overrides
    assert done.run is not None and done.run.path == made / "sweep/1" and len(done.run.metrics) == 1
    # One that has not ended.
    shutil.copytree(made / "sweep", tmp_path / "sweep")
    (tmp_path / "sweep/1/job.json").unlink()
    _, going_on = dppo_cli.open_sweep(tmp_path / "sweep")
    assert (going_on.number, going_on.overrides, going_on.run is not None) == (1, None, True)


def test_names_that_look_like_samples_are_none(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "run", "steps: 1\n", 0) as folder:
        folder.log({"step": 1})
        for step in (10, 2):
            folder.write_samples(step, "{}\n")
    for name in ("step-3.json", "step-٣.jsonl", "step-03.jsonl", "step-x.jsonl", ".step-4.jsonl.tmp", "step-5.jsonl\n"):
        (tmp_path / "run/samples" / name).write_text("{}\n")
    assert dppo_cli.open_run(tmp_path / "run").sample_steps == [2, 10]


def test_the_package_alone_imports_neither_reader_nor_torch() -> None:
    code = (
        "import sys, dppo_cli; before = set(sys.modules); dppo_cli.open_run; "
        "print(*(n for n in ('torch', 'omegaconf', 'dppo_cli.reading') if n in before), '|', "
        "*(n for n in ('torch', 'transformers', 'pandas', 'dppo_cli.reading') if n in sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "| dppo_cli.reading"
    with pytest.raises(AttributeError, match=r"^module 'dppo_cli' has no attribute 'open_runs'$"):
        dppo_cli.open_runs  # noqa: B018
