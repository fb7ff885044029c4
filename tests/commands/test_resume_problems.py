"""A resume whose data was edited: other held-out problems are refused, other training problems warned of."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from disturbed import contents, outcome, warned
from helpers import read_json, train

from dppo_cli.cli.main import main
from dppo_cli.training.state import RunState, Snapshot

pytestmark = pytest.mark.usefixtures("work")

WORDS = (
    *("data=file", "data.path=train.jsonl", "data.eval_path=held.jsonl", "data.eval_problems=null"),
    *("eval_sets.more=file", "eval_sets.more.path=held.jsonl", "eval_sets.more.eval_path=more.jsonl"),
    *("run_dir=run", "checkpoint.every=1"),
)
TRAIN, HELD, MORE = range(20), range(50, 54), range(60, 63)
CHANGED = (
    "the training problems have changed since step 2; the run goes on with the present ones, so it equals no run that "
    "had one data set from the start"
)


def write_sums(name: str, numbers: Sequence[int], added: int = 1) -> None:
    rows = [{"prompt": f"{n}+1=", "answer": str(n + added)} for n in numbers]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def _files(work: Path) -> None:
    for name, numbers in (("train", TRAIN), ("held", HELD), ("more", MORE)):
        write_sums(f"{name}.jsonl", numbers)


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of a resume, which has changed nothing."""
    before = contents(Path("run"))
    capsys.readouterr()
    assert main(["train", "resume=run", "steps=4"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and contents(Path("run")) == before
    return said.strip()


def test_other_held_out_problems_are_refused_and_the_same_go_on(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, *WORDS, "steps=4", "run_dir=whole") == 0
    assert train(model, *WORDS) == 0
    other = "a prompt, an answer or the order has changed"
    held, more = "the held-out problems of data", "the problems of eval_sets.more"
    edits = [
        ("held.jsonl", [50, 51, 52, 58], 1, held, other),
        ("held.jsonl", HELD, 2, held, other),
        ("held.jsonl", HELD[::-1], 1, held, other),
        ("held.jsonl", HELD[:3], 1, held, "4 then, 3 now"),
        ("held.jsonl", range(50, 56), 1, held, "4 then, 6 now"),
        ("more.jsonl", MORE[:2], 1, more, "3 then, 2 now"),
    ]
    for name, numbers, added, which, what in edits:
        kept = Path(name).read_bytes()
        write_sums(name, numbers, added)
        assert refused(capsys) == (
            f"dppo: {which} are not those of the run's first evaluation ({what}), so the last one could not be "
            "compared with it. Restore the data to go on, or train the adapter further in a new run: "
            "adapter.path=run/checkpoints/step-2/adapter"
        )
        Path(name).write_bytes(kept)
    assert main(["train", "resume=run", "steps=4"]) == 0
    found, whole = outcome(Path("run")), outcome(Path("whole"))
    assert all(found[key] == whole[key] for key in ("adapter", "metrics", "warnings")) and not found["warnings"]
    assert read_json(Path("run/summary.json"))["evaluations"] == read_json(Path("whole/summary.json"))["evaluations"]


def test_what_the_refusal_says_to_type_works(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, *WORDS) == 0
    write_sums("held.jsonl", HELD[:3])
    word = refused(capsys).split()[-1]
    assert train(model, *WORDS, "run_dir=other", word) == 0
    assert read_json(Path("other/summary.json"))["eval_problems"] == 3


def test_other_training_problems_are_warned_of_once(model: Path) -> None:
    assert train(model, *WORDS) == 0
    write_sums("train.jsonl", range(25))
    assert main(["train", "resume=run", "steps=3"]) == 0
    assert [row["warning"] for row in warned(Path("run"))] == [CHANGED]
    assert main(["train", "resume=run", "steps=4"]) == 0
    assert read_json(Path("run/summary.json"))["warnings"] == [CHANGED]
    write_sums("train.jsonl", range(3))
    assert main(["train", "resume=run", "steps=5"]) == 0
    summary = read_json(Path("run/summary.json"))
    assert summary["warnings"] == [CHANGED, CHANGED.replace("step 2", "step 4")]
    assert summary["evaluations"]["held_out"]["difference"]["problems"] == 4


def test_a_run_of_a_version_without_fingerprints(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It goes on as it did, but with another number of held-out problems."""
    real = RunState.snapshot

    def older(state: RunState) -> Snapshot:
        found = real(state)
        before = {name: {**measured} for name, measured in found.plain["before"].items()}
        for values in (found.plain, *before.values()):
            del values["fingerprint"]
        return Snapshot(found.tensors, {**found.plain, "before": before})

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "snapshot", older)
        assert train(model, *WORDS) == 0
    assert "fingerprint" not in Path("run/checkpoints/step-2/state.json").read_text()
    write_sums("held.jsonl", HELD[:3])
    assert "first evaluation (4 then, 3 now)" in refused(capsys)
    write_sums("held.jsonl", HELD)
    write_sums("train.jsonl", range(25))
    assert main(["train", "resume=run", "steps=4"]) == 0
    assert read_json(Path("run/summary.json"))["warnings"] == []
