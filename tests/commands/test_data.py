"""`dppo data`: what is shown, what the reward is tried on, and the file of problems that are worth training on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import TINY_RUN, read_lines

from dppo_cli.cli.main import main

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture(autouse=True)
def _file(work: Path) -> None:
    rows = [{"question": f"{n % 9}+{n}=", "answer": f"so #### {n % 9 + n}", "level": n} for n in range(30)]
    (work / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows[:9], rows[1], *rows[9:]]))


@pytest.fixture
def words(model: Path) -> list[str]:
    data = ["data=file", "data.path=sums.jsonl", "data.prompt_column=question", "data.answer_pattern='#### (.*)'"]
    return [*TINY_RUN, f"model.path={model}", *data]


@pytest.fixture
def report(words: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    def reporting(*more: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["data", *words, "json=true", *more]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return reporting


def test_the_problems_are_shown_as_the_model_gets_them(report: Callable[..., dict[str, Any]]) -> None:
    found = report("prompt.template=chat", "prompt.system=add", "rows=1")
    (row,) = found["rows"]
    assert row["prompt"] == "<system>add\n<user>0+0=\n<a>"
    assert (row["problem"], row["answer"], row["columns"]) == (0, "0", {"level": "0"})
    assert report("rows=0")["rows"] == []


def test_lengths_and_repeats(report: Callable[..., dict[str, Any]]) -> None:
    found = report("data.eval_problems=4", "prompt.too_long=drop", "sampling.max_new_tokens=252")
    train = found["sets"]["train"]
    assert (train["problems"], train["shortest"], train["longest"], train["positions"]) == (27, 4, 5, 256)
    assert sum(n for _, _, n in train["histogram"]) == 27
    assert [(low, high) for low, high, _ in train["histogram"]] == [(4, 4), (5, 5)]
    assert train["too_long"] == train["histogram"][1][2], "five tokens and 252 are more than 256"
    assert found["sets"]["held_out"]["problems"] == 4
    assert found["duplicates"] == 1
    assert any("problems of train do not fit into the 256 positions" in text for text in found["warnings"])


def test_the_reward_is_tried_on_right_and_wrong_answers(report: Callable[..., dict[str, Any]]) -> None:
    found = report("reward=gsm8k", "check=5")
    success = {row["response"]: row["success"] for row in found["reward"]}
    assert success["after ####"] == 1.0 and success["nothing"] == 0.0
    assert success["another problem's answer"] == 0.0
    assert {row["judged"] for row in found["reward"]} == {5}
    assert found["warnings"] == report("check=0")["warnings"], "the reward is as it should be"
    assert report("check=0")["reward"] is None


def test_a_reward_that_accepts_nothing_or_anything_is_told(report: Callable[..., dict[str, Any]], work: Path) -> None:
    found = report("reward=exact", "reward.pattern='never (x)'")
    assert any("no form of the right answer gets a reward of eval.success_reward=1" in t for t in found["warnings"])
    (work / "any.py").write_text("def f(completions, **kwargs):\n    return [1.0] * len(completions)\n")
    found = report("reward=function", "reward.path=any.py:f")
    assert "a wrong response counts as right: another problem's answer, nothing" in found["warnings"]


def test_the_tables(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *words, "check=3"]) == 0
    shown = capsys.readouterr().out
    for text in ("tokens of the prompts", "tokens, train", "problem 1, 4 tokens", "level", "what the reward gives"):
        assert text in shown
    assert "1 training problems are repeats of another" in shown and "100.0%" in shown


def test_difficulty_writes_the_problems_that_are_worth_training_on(
    words: list[str], report: Callable[..., dict[str, Any]], work: Path
) -> None:
    """A reward that knows: the level decides how many of four samples are right."""
    (work / "known.py").write_text(
        "def f(completions, level, **kwargs):\n"
        "    return [float(i % 4 < n % 5) for i, n in enumerate(level)]\n"
        "f.whole_groups = True\n"
    )
    more = ("reward=function", "reward.path=known.py:f", "check=0", "difficulty=true", "problems=21", "out=some.jsonl")
    found = report(*more)["difficulty"]
    assert (found["problems"], found["samples_per_prompt"], found["never"], found["always"]) == (21, 4, 4, 4)
    assert found["solve_rate"] == pytest.approx(10.25 / 21)
    assert (found["kept"], found["out"]) == (13, "some.jsonl")
    assert [n for _, _, n in found["histogram"]] == [4, 0, 5, 0, 0, 4, 0, 4, 0, 4]
    rows = read_lines(Path("some.jsonl"))
    assert {row["solve_rate"] for row in rows} == {0.25, 0.5, 0.75}
    assert all(
        row["solve_rate"] == row["level"] % 5 / 4 and row["answer"] == str(row["level"] % 9 + row["level"])
        for row in rows
    )
    assert rows[0]["prompt"] == rows[0]["question"] == "1+1="
    # The file is data again, with what the order of prompts starts from.
    again = ["data=file", "data.path=some.jsonl", "data.eval_problems=2", "order=solve_rate", "run_dir=run"]
    assert main(["train", *words, *again, "data.prompt_column=prompt", "data.answer_pattern=null"]) == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["out=some.jsonl"], "out=some.jsonl is for the problems that difficulty=true keeps"),
        (["difficulty=true", "out=sums.jsonl"], "out=sums.jsonl exists; name a new file"),
        (["keep=[0.9,0.1]"], "keep=[0.9, 0.1] breaks the rule"),
        (["rows=-1"], "rows=-1 breaks the rule rows >= 0"),
        (["model.path=nowhere/at/all"], "there is no model folder nowhere/at/all"),
        (["data.prompt_column=text"], "there is no column 'text' (data.prompt_column)"),
    ],
)
def test_what_cannot_be_shown(more: list[str], said: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *words, *more]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
