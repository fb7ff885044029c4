"""What a run is evaluated on, and which of its prompts it learns from: sets, intervals, dynamic sampling, order."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TINY_RUN, read_json, read_lines, train, write_rewards

from dppo_cli.cli.main import main
from dppo_cli.training.metrics import COST

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def refusing(*words: str) -> str:
        capsys.readouterr()
        assert main(["train", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    return refusing


def write_sums(name: str, numbers: range) -> None:
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1)} for n in numbers]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def _files(work: Path) -> None:
    write_sums("train.jsonl", range(20))
    write_sums("more.jsonl", range(15, 30))
    write_sums("small.jsonl", range(50, 54))


OWN = ("data=file", "data.path=train.jsonl", "data.eval_problems=4", "run_dir=run")
MORE = ("eval_sets.more=file", "eval_sets.more.path=small.jsonl", "eval_sets.more.eval_path=more.jsonl")


def test_more_sets_are_evaluated_before_and_after(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("eval_sets.more.eval_problems=6", "eval.samples_per_prompt=2", "checkpoint.every=1")
    assert train(model, *OWN, *MORE, *words) == 0
    summary = read_json(Path("run/summary.json"))
    found = summary["evaluations"]
    assert set(found) == {"held_out", "more"}
    assert [found[name]["before"]["problems"] for name in ("held_out", "more")] == [4, 6]
    assert [found[name]["after"]["samples"] for name in ("held_out", "more")] == [8, 12]
    assert found["more"]["difference"]["problems"] == 6
    assert list(found["more"]["after"]["pass_at"]) == ["1", "2"]
    assert summary["eval_before"] == found["held_out"]["before"]["accuracy"]
    low, high = found["held_out"]["before"]["interval"]
    assert 0 <= low <= summary["eval_before"] <= high <= 1
    # The problems of a set are not trained on: 15 is the only one that is in both, apart from the held-out ones.
    assert "1 training problems are in eval_sets, too, and are left out of training" in summary["warnings"][0]
    shown = capsys.readouterr().out
    assert "of 12 more samples right" in shown and "accuracy after, more" in shown and "difference, more" in shown
    before = read_json(Path("run/checkpoints/step-1/state.json"))["before"]
    assert len(before["more"]["rates"]) == 6


def test_a_run_that_goes_on_compares_with_before(model: Path) -> None:
    words = (*OWN, *MORE, "steps=3", "checkpoint.every=1")
    assert train(model, *words) == 0
    whole = read_json(Path("run/summary.json"))["evaluations"]
    assert train(model, *words, "run_dir=half", "steps=1") == 0
    assert main(["train", "resume=half", "steps=3"]) == 0
    assert read_json(Path("half/summary.json"))["evaluations"] == whole


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval_sets.more=fil"], "eval_sets.more=fil: there is no data=fil; did you mean 'file'?"),
        (["eval_sets.held_out=arithmetic"], "eval_sets.held_out: the held-out problems of `data` have that name"),
        ([*MORE[:2], "eval_sets.more.eval_path=none.jsonl"], "there is no file none.jsonl"),
        ([*MORE, "eval_sets.more.answer_colum=x"], "answer_colum"),
    ],
)
def test_sets_that_there_are_not(words: list[str], said: str, refused: Callable[..., str], model: Path) -> None:
    own = [word for word in TINY_RUN if not word.startswith("data.")]
    assert said in refused(*own, f"model.path={model}", *OWN, *words)


def test_a_plain_member_can_be_any_source(model: Path) -> None:
    assert train(model, "eval_sets.sums=arithmetic", "eval_sets.sums.eval_problems=3", "run_dir=run") == 0
    assert read_json(Path("run/summary.json"))["evaluations"]["sums"]["after"]["problems"] == 3


def test_groups_of_equal_rewards_are_replaced(model: Path, work: Path) -> None:
    (work / "rewards.py").write_text(
        "def some(prompts, completions, **columns):\n"
        "    return [float(i % 2 and int(p.split('+')[0]) % 3 == 0) for i, p in enumerate(prompts)]\n"
    )
    words = (*OWN, "reward.path=rewards.py:some", "replacement_rounds=4", "steps=3")
    assert train(model, *words) == 0
    rows = read_lines(Path("run/metrics.jsonl"))
    assert [row["sampling_rounds"] for row in rows] != [1, 1, 1]
    assert all(row["sampled_groups"] >= 2 and row["sampled_groups"] * 4 >= 8 for row in rows)
    assert any(row["equal_groups"] > 0 for row in rows)
    assert train(model, *words[:-2], "run_dir=without", "steps=3") == 0
    assert [row["sampled_groups"] for row in read_lines(Path("without/metrics.jsonl"))] == [2, 2, 2]


def test_a_run_with_replacements_and_an_order_of_its_own_goes_on_exactly(model: Path, work: Path) -> None:
    write_rewards(work)
    words = (*OWN, "replacement_rounds=2", "order=solve_rate", "eval.success_reward=0.4", "checkpoint.every=1")
    assert train(model, *words, "steps=4") == 0
    assert train(model, *words, "steps=2", "run_dir=half") == 0
    assert main(["train", "resume=half", "steps=4"]) == 0

    def lines(run: str) -> list[dict[str, object]]:
        return [{k: v for k, v in row.items() if k not in COST} for row in read_lines(Path(run) / "metrics.jsonl")]

    assert lines("half") == lines("run")
    weights = "adapter/adapter_model.safetensors"
    assert Path("half", weights).read_bytes() == Path("run", weights).read_bytes()
    seen = read_json(Path("run/checkpoints/step-4/state.json"))["prompts"]["seen"]
    assert 0 < len(seen) <= 16, "of 16 training problems"


def test_prompts_that_are_too_long_are_refused_or_left_out(
    model: Path, refused: Callable[..., str], work: Path
) -> None:
    with open("train.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "1" * 300, "answer": "1"}) + "\n")
    own = (*[w for w in TINY_RUN if not w.startswith("data.")], f"model.path={model}")
    data = ("data=file", "data.path=train.jsonl", "data.eval_path=more.jsonl", "run_dir=run")
    said = refused(*own, *data)
    assert "problem 15 has 300 tokens" in said and "or leave out such problems with prompt.too_long=drop" in said
    assert main(["train", *own, *data, "prompt.too_long=drop"]) == 0
    assert any("1 of 16 problems are too long" in text for text in read_json(Path("run/summary.json"))["warnings"])
