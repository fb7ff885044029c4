"""What a resume refuses, by name and with nothing changed, and what it takes."""

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest
from disturbed import WEIGHTS, contents, fail_at, outcome
from helpers import read_json, read_lines, train, write_rewards
from omegaconf import OmegaConf

from dppo_cli.cli.main import main
from dppo_cli.commands import resume
from dppo_cli.commands import train as command
from dppo_cli.config.saved import sign
from dppo_cli.training.run_folder import RunFolder

WORDS = ("steps=4", "optim.lr=0.01", "eval.every=2", "eval.success_reward=0.45", "checkpoint.every=0")

pytestmark = pytest.mark.usefixtures("work")

Refused = Callable[..., str]


@pytest.fixture(scope="module")
def stopped(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three runs that were stopped after two steps. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("stopped")
    model = tiny_models["llama3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        for run, words in (("run", ()), ("cosine", ("optim.schedule=cosine",))):
            with pytest.MonkeyPatch.context() as inner:
                fail_at(3, RunFolder, "log", inner)
                assert train(model, *WORDS, *words, f"run_dir={run}") == 130
        assert train(model, *WORDS, "steps=2", "run_dir=done") == 0
    return folder


@pytest.fixture
def run(stopped: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run that was stopped, in the working folder."""
    for name in ("run", "cosine", "done"):
        shutil.copytree(stopped / name, work / name)
    return work / "run"


@pytest.fixture
def again(stopped: Path, model: Path) -> Callable[..., int]:
    """The command that has made the run, with other words after it."""
    return lambda *words: train(model, *WORDS, f"reward.path={stopped}/rewards.py:late", *words)


@pytest.fixture
def refused(run: Path, work: Path, again: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused("resume=run", "seed=2")`: the line shown; nothing on the disk has changed."""

    def refuse(*words: str, auto: bool = False) -> str:
        before = contents(work)
        capsys.readouterr()
        assert (again(*words) if auto else main(["train", *words])) == 2
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1 and captured.err.startswith("dppo: ")
        assert contents(work) == before
        return captured.err.removeprefix("dppo: ").strip()

    return refuse


CHANGES = [
    ("optim.lr=0.02", "optim.lr"),
    ("seed=2", "seed"),
    ("divergence=kl", "divergence"),
    ("approx=topk", "approx"),
    ("objective=cispo", "objective"),
    ("data.train_problems=16", "data.train_problems"),
    ("data.eval_problems=5", "data.eval_problems"),
    ("batch.samples_per_prompt=2", "batch.samples_per_prompt"),
    ("eval.every=1", "eval.every"),
    ("hardware.tokens_per_micro_batch=64", "hardware.tokens_per_micro_batch"),
    ("kl_to_reference=0.1", "kl_to_reference"),
]


@pytest.mark.parametrize(("word", "key"), CHANGES)
def test_what_would_make_it_another_run_is_refused_by_name(word: str, key: str, refused: Refused) -> None:
    check_refusal(refused("resume=run", word), key)


@pytest.mark.parametrize(("word", "key"), CHANGES[:6])
def test_it_is_refused_by_name_where_a_run_goes_on_by_itself(word: str, key: str, refused: Refused) -> None:
    check_refusal(refused("run_dir=run", "resume=auto", word, auto=True), key)


def check_refusal(text: str, key: str) -> None:
    # Of a group, a key in it.
    assert text.startswith((f"{key}=", f"{key}."))
    assert "cannot replace" in text and "start a new run" in text


@pytest.mark.parametrize("auto", [False, True], ids=["resume=run", "resume=auto"])
def test_another_model_is_refused(auto: bool, refused: Refused, tiny_models: dict[str, Path]) -> None:
    words = ("run_dir=run", "resume=auto") if auto else ("resume=run", "model=hf")
    text = refused(*words, f"model.path={tiny_models['qwen3']}", auto=auto)
    assert text.startswith("model") and "cannot replace" in text


@pytest.mark.parametrize("auto", [False, True], ids=["resume=run", "resume=auto"])
def test_a_recipe_is_refused(auto: bool, refused: Refused) -> None:
    words = ("recipe=stability", "hydra.mode=RUN")  # This one is a sweep by itself.
    text = refused(*(("run_dir=run", "resume=auto") if auto else ("resume=run",)), *words, auto=auto)
    assert ("cannot replace" in text) if auto else ("leave recipe out" in text)


@pytest.mark.parametrize("auto", [False, True], ids=["resume=run", "resume=auto"])
def test_under_a_cosine_the_number_of_steps_is_part_of_the_method(auto: bool, refused: Refused) -> None:
    words = ("run_dir=cosine", "resume=auto", "optim.schedule=cosine") if auto else ("resume=cosine",)
    assert refused(*words, "steps=6", auto=auto) == (
        "steps=6 cannot replace the run's steps=4: under optim.schedule=cosine every step's learning rate depends on "
        "it; start a new run"
    )


def test_steps_cannot_be_fewer_than_are_done(refused: Refused) -> None:
    assert refused("resume=run", "steps=1") == "steps=1 is less than the 2 steps that the run has done"


def test_a_finished_run_goes_on_with_more_steps_only(refused: Refused) -> None:
    assert refused("resume=done") == "resume=done: all 2 steps of this run are done; to go on, raise steps"


def test_a_resume_needs_a_run(refused: Refused, work: Path) -> None:
    (work / "empty").mkdir()
    for name in ("nowhere", "empty", "run/adapter"):
        assert refused(f"resume={name}").startswith(f"resume={name} is not a run: it has no config.yaml")
    assert refused("resume=auto") == "resume=auto needs the folder to start or go on in; add run_dir=..."
    (work / "loop").symlink_to("loop")
    for name in ("other", "loop"):
        assert refused("resume=run", f"run_dir={name}").startswith("resume=run goes on in its own folder")


def test_a_folder_that_holds_something_else_is_not_started_in(refused: Refused, work: Path) -> None:
    (work / "other").mkdir()
    (work / "other/thesis.tex").touch()
    assert refused("run_dir=other", "resume=auto", auto=True).startswith("run_dir=other is not empty")


def test_a_config_that_was_edited_after_the_checkpoint_is_refused(run: Path, refused: Refused, stopped: Path) -> None:
    config = run / "config.yaml"
    assert "lr: 0.01" in config.read_text()
    config.write_text(config.read_text().replace("lr: 0.01", "lr: 0.02"))
    # The user's signature is no longer right, and the run has a reward function.
    assert "names code that would run: reward.path=" in refused("resume=run")
    text = refused("resume=run", "trust=true")
    assert text.startswith("run/config.yaml was changed after run/checkpoints/step-2 was written")
    assert refused("run_dir=run", "resume=auto", auto=True).startswith("optim.lr=0.01 cannot replace optim.lr=0.02")


# What is taken


def test_a_member_that_was_left_out_is_asked_for(
    work: Path, again: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    members = ("filter=all_of", "filter.members.band=icepop", "filter.members.rare=veto")
    assert again(*members, "steps=1", "run_dir=both") == 0
    assert main(["train", "resume=both", *members[:2], "steps=2"]) == 2
    assert "filter.members.rare._target_=dppo_cli.algorithm.filters.Band of the run in both is not among what was" in (
        capsys.readouterr().err
    )
    assert main(["train", "resume=both", *members, "steps=2"]) == 0


@pytest.mark.parametrize("auto", [False, True])
def test_a_run_from_before_there_were_regions_filters_and_environments_goes_on(
    auto: bool, run: Path, again: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither its config nor the hash of that in its checkpoint knows of them."""
    node = OmegaConf.load(run / "config.yaml")
    for key in ("region", "filter", "verdict", "environment"):
        del node[key]
    (run / "config.yaml").write_text(sign(OmegaConf.to_yaml(node)))
    known = {key: value for key, value in resume._flat(node).items() if not resume._may_change(key)}
    manifest = run / "checkpoints/step-2/manifest.json"
    of_then = {"config_sha256": sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()}
    manifest.write_text(json.dumps(read_json(manifest) | of_then))
    assert main(["train", "resume=run", "filter=icepop"]) == 2
    assert "filter._target_=dppo_cli.algorithm.filters.Band cannot replace" in capsys.readouterr().err
    assert (again("run_dir=run", "resume=auto") if auto else main(["train", "resume=run"])) == 0
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4]


def test_more_steps_under_a_constant_learning_rate(run: Path, work: Path, again: Callable[..., int]) -> None:
    """As if the run had been so long from the start, apart from the evaluation where the shorter one ended."""
    assert again("run_dir=long") == 0
    assert main(["train", "resume=done", "steps=4"]) == 0
    assert read_json(work / "done/summary.json")["resumes"] == [{"step": 2, "changes": {"steps": [2, 4]}}]
    assert OmegaConf.load(work / "done/config.yaml").steps == 4
    found, expected = outcome(work / "done"), outcome(work / "long")
    assert found["samples"].pop("step-2.jsonl"), "the shorter run kept those of what was its last step"
    rows, longer = found.pop("metrics"), expected.pop("metrics")
    assert found == expected
    assert [rows[0], *rows[2:]] == [longer[0], *longer[2:]]
    assert "eval_accuracy" not in rows[1] and rows[1].removesuffix("}") == longer[1].partition(', "eval_accuracy"')[0]


def test_steps_may_be_fewer_as_long_as_they_are_not_done(run: Path, work: Path, again: Callable[..., int]) -> None:
    assert main(["train", "resume=run", "steps=3"]) == 0
    assert again("run_dir=short", "steps=3") == 0
    assert outcome(run) == outcome(work / "short")


def test_how_often_and_how_many_checkpoints_may_change(run: Path, work: Path, again: Callable[..., int]) -> None:
    assert again("run_dir=undisturbed") == 0
    assert main(["train", "resume=run", "checkpoint.every=1", "checkpoint.keep=7", "checkpoint.grace=5"]) == 0
    assert outcome(run) == outcome(work / "undisturbed")
    changes = {"checkpoint.every": [0, 1], "checkpoint.keep": [2, 7], "checkpoint.grace": [60.0, 5.0]}
    assert read_json(run / "summary.json")["resumes"] == [{"step": 2, "changes": changes}]
    assert dict(OmegaConf.load(run / "config.yaml").checkpoint) == {"every": 1, "keep": 7, "grace": 5.0}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-2", "step-3", "step-4"]


def test_a_finished_run_is_left_alone(
    run: Path,
    work: Path,
    again: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A scheduler that restarts jobs may start this one again. It loads nothing."""
    before = contents(work / "done")
    monkeypatch.setattr(command, "load_policy", None)
    assert again("steps=2", "run_dir=done", "resume=auto") == 0
    assert contents(work / "done") == before
    assert capsys.readouterr().out == "done: all 2 steps are done\n"


def test_a_sweep_goes_on_with_what_is_broken_and_skips_what_is_finished(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("-m", "seed=1,2", "steps=3", "resume=auto")
    assert train(model, *words, "run_dir=undisturbed") == 0
    with monkeypatch.context() as patch:
        fail_at(5, RunFolder, "log", patch)
        assert train(model, *words, "run_dir=sweep") == 130
    record = read_json(work / "sweep/1/job.json")
    assert record["status"] == 130 and "the state after step 1 is saved" in record["error"]
    before = {name: content for name, content in contents(work / "sweep/0").items() if name != "job.json"}
    assert train(model, *words, "run_dir=sweep") == 0
    assert {name: content for name, content in contents(work / "sweep/0").items() if name != "job.json"} == before
    for job in ("0", "1"):
        assert outcome(work / "sweep" / job) == outcome(work / "undisturbed" / job)
        assert read_json(work / f"sweep/{job}/job.json")["status"] == 0
    assert outcome(work / "sweep/0")["adapter"] != outcome(work / "sweep/1")["adapter"]
    assert "seed=1" in capsys.readouterr().out
    assert len(read_lines(work / "sweep/1/metrics.jsonl")) == 3
    assert (work / "sweep/1" / WEIGHTS).is_file()
