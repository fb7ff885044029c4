"""A run that was stopped and goes on equals an undisturbed one in every bit, wherever it was stopped."""

from pathlib import Path
from typing import Any

import pytest
from disturbed import contents, fail_at, outcome
from helpers import read_json, read_lines, train, write_rewards

from dppo_cli.cli.main import main
from dppo_cli.commands import train as command
from dppo_cli.rollout.local import LocalEngine
from dppo_cli.telemetry.trust_region import MaskedTokens
from dppo_cli.training import evaluation
from dppo_cli.training.learner import Learner
from dppo_cli.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("work")

# Whatever a run can remember matters here: random numbers in an update, the schedule, the order of mini-batches, the
# best evaluation. The thresholds are so small that tokens are masked, and unusual, which is a warning.
CHOSEN = (
    "adapter.dropout=0.1",
    "optim.lr=0.01",
    "optim.schedule=cosine",
    "batch.epochs=2",
    "eval.every=2",
    "eval.success_reward=0.45",
    "divergence.delta_low=0.005",
    "divergence.delta_high=0.005",
    "steps=5",
    "samples.every=2",
    "samples.groups=1",
)


# Where each process is stopped, by Ctrl-C in the middle of something, and how many steps are finished then.
STOPS = [
    (4, Learner, "update", False, 0),  # in the last update of step 1: nothing is kept
    (7, Learner, "update", False, 1),  # in the third of four updates of step 2
    (2, Learner, "step", True, 1),  # weights and moments of step 2 have changed twice
    (1, evaluation, "evaluate", False, 1),  # in the evaluation after step 2
    (3, LocalEngine, "generate", False, 2),  # step 2, its evaluation, and in the rollout of step 3
    (2, RunFolder, "log", True, 3),  # step 3, and the line of step 4, which is not finished
    (2, LocalEngine, "sync", False, 3),  # after the updates of step 4
    (2, evaluation, "evaluate", False, 5),  # in between, after step 4; step 5, and in the evaluation at the end
    (1, evaluation, "evaluate", True, 5),
]
# In the middle of the updates, of a rollout, and at the end.
SOME = [STOPS[n] for n in (1, 4, 5, 7)]

METHODS = {
    "lora": (CHOSEN, STOPS),
    "qlora": ((*CHOSEN, "adapter=qlora"), SOME),
    "dora": ((*CHOSEN, "adapter=dora"), SOME),
    # Of rank 128, matrices are large enough for 8 bits.
    "8-bit moments": ((*CHOSEN, "optim=adamw_8bit", "adapter.r=128", "optim.lr=0.01"), SOME),
    "recompute, topk": ((*CHOSEN, "anchor=recompute", "approx=topk", "approx.k=4"), SOME),
    "gradient checkpointing": ((*CHOSEN, "hardware.gradient_checkpointing=true"), SOME),
}


def interrupt(patch: pytest.MonkeyPatch, call: int, owner: Any, name: str, after: bool) -> None:
    fail_at(call, owner, name, patch, after=after)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_stopped_again_and_again_equals_an_undisturbed_one(
    method: str, model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, stops = METHODS[method]
    reached = []
    assert train(model, *words, "run_dir=undisturbed") == 0
    for call, owner, name, after, done in stops:
        with monkeypatch.context() as patch:
            # The process that starts evaluates once more.
            first = not (work / "run").exists() and owner is evaluation
            interrupt(patch, call + first, owner, name, after)
            assert train(model, *words, "run_dir=run", "resume=auto") == 130
        said = capsys.readouterr().err
        if not done:
            assert said == "dppo: stopped: no step was finished; nothing is saved\n"
            assert not (work / "run").exists()
            continue
        assert said == (f"dppo: stopped: the state after step {done} is saved; to go on: dppo train resume=run\n"), (
            f"{name} {call}"
        )
        reached.append(done)
        summary = read_json(work / "run/summary.json")
        assert (summary["steps"], summary["interrupted"], summary["eval_after"]) == (done, True, None)
        assert len(read_lines(work / "run/metrics.jsonl")) == done
        assert (work / "run/masked_tokens.json").is_file()
    assert main(["train", "resume=run"]) == 0
    found, expected = outcome(work / "run"), outcome(work / "undisturbed")
    assert found == expected
    assert sorted(found["samples"]) == [f"step-{step}.jsonl" for step in (1, 2, 4, 5)]
    resumes = read_json(work / "run/summary.json")["resumes"]
    # Those that finished no step, too.
    assert resumes == [{"step": step, "changes": {}} for step in reached]
    # The run was one in which all of this could have gone wrong.
    rows = read_lines(work / "run/metrics.jsonl")
    assert any(row["masked_positive"] + row["masked_negative"] > 0 for row in rows)
    assert len({row["lr"] for row in rows}) == 5 and all(row["gradient_norm"] > 0 for row in rows)
    assert ["eval_accuracy" in row for row in rows] == [False, True, False, True, False]
    assert expected["warnings"] and len(set(expected["warnings"])) == len(expected["warnings"])


# The end of a run, from its last step on


PHASES_OF_THE_END = [
    (owner, name, after)
    for owner, name in (
        (command, "write_checkpoint"),
        (RunFolder, "save_adapter"),
        (MaskedTokens, "finished"),
        (RunFolder, "write"),
    )
    for after in (False, True)
]


@pytest.fixture(scope="module")
def undisturbed(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of two steps finds."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        assert train(tiny_models["llama3"], "run_dir=run") == 0
        return outcome(folder / "run")


def test_a_run_that_is_stopped_at_its_very_end_is_complete_after_a_resume(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Any]
) -> None:
    """The summary, which says that nothing is left to do, comes after everything else."""
    for owner, name, after in PHASES_OF_THE_END:
        with monkeypatch.context() as patch:
            interrupt(patch, 1, owner, name, after)
            assert train(model, "run_dir=run", "resume=auto") == 130, f"{name} {after}"
    assert train(model, "run_dir=run", "resume=auto") == 0
    assert outcome(work / "run") == undisturbed


# Which folder, and what is in it


def test_a_run_goes_on_by_the_name_of_the_newest(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Any]
) -> None:
    """runs/last is a link: the run stays where it is, and the link still leads there."""
    with monkeypatch.context() as patch:
        fail_at(2, RunFolder, "log", patch)
        assert train(model) == 130
    (run,) = [path for path in (work / "runs").iterdir() if path.name != "last"]
    assert main(["train", "resume=runs/last"]) == 0
    assert outcome(run) == undisturbed
    assert (work / "runs/last").resolve() == run
    assert sorted(path.name for path in (work / "runs").iterdir()) == sorted([run.name, "last"])


def test_a_run_goes_on_from_another_folder(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Any]
) -> None:
    with monkeypatch.context() as patch:
        fail_at(2, RunFolder, "log", patch)
        assert train(model, "run_dir=run") == 130
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    assert main(["train", "resume=../run"]) == 0
    assert outcome(work / "run") == undisturbed


def test_the_same_words_with_resume_go_on(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Any]
) -> None:
    """Somebody who takes the command from the history and adds resume=RUN changes nothing, relative paths or not."""
    with monkeypatch.context() as patch:
        fail_at(2, RunFolder, "log", patch)
        assert train(model, "run_dir=run") == 130
    assert train(model, "run_dir=run", "resume=run") == 0
    assert outcome(work / "run") == undisturbed
    assert read_json(work / "run/summary.json")["resumes"] == [{"step": 1, "changes": {}}]


def test_resume_auto_starts_a_run_where_there_is_none(model: Path, work: Path, undisturbed: dict[str, Any]) -> None:
    assert train(model, "run_dir=run", "resume=auto") == 0
    assert outcome(work / "run") == undisturbed
    assert read_json(work / "run/summary.json")["resumes"] == []


def test_a_run_without_a_checkpoint_starts_anew(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Any]
) -> None:
    """It was killed before its first one."""
    with monkeypatch.context() as patch:
        fail_at(2, RunFolder, "log", patch)
        # As if the process had been killed: it saves nothing, and the second line is torn.
        patch.setattr(command, "rescue", lambda error, *rest: (error, None))
        assert train(model, "run_dir=run") == 130
    with (work / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "reward": 0.')
    assert sorted(contents(work / "run")) == [
        "config.yaml",
        "eval_before.json",
        "metrics.jsonl",
        "samples/step-1.jsonl",
    ]
    assert train(model, "run_dir=run", "resume=auto") == 0
    found = outcome(work / "run")
    told = "the run has no complete checkpoint; it starts anew"
    assert found.pop("warnings") == [told]
    assert found == {key: value for key, value in undisturbed.items() if key != "warnings"}
