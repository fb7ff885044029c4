"""Problems of reasoning-gym: always the same, held-out ones apart, and scorable from their columns."""

import json
import sys
from typing import Any

import pytest

pytest.importorskip("reasoning_gym", reason="needs the extra dppo[tasks]")

from dppo_cli.data.reasoning_gym import ReasoningGym
from dppo_cli.data.task import Task
from dppo_cli.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def load(**fields: Any) -> tuple[Task, list[str]]:
    told: list[str] = []
    defaults = {"task": "spell_backward", "options": None, "seed": 1, "train_problems": 20, "eval_problems": 5}
    return ReasoningGym(**{**defaults, **fields}).load(told.append), told


def refused(**fields: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(**fields)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_problems_of_a_task() -> None:
    task, told = load(options={"min_word_len": 4, "max_word_len": 5})
    assert (len(task.train), len(task.heldout), told) == (20, 5, [])
    for example in [*task.train, *task.heldout]:
        word = example.prompt.rpartition(": ")[2]
        assert 4 <= len(word) <= 5
        assert example.answer == word[::-1]
        assert example.columns["task"] == "spell_backward"
        assert (example.columns["question"], example.columns["answer"]) == (example.prompt, example.answer)
    assert {e.prompt for e in task.train}.isdisjoint(e.prompt for e in task.heldout)


def test_the_seed_alone_decides_and_a_longer_training_set_moves_nothing() -> None:
    first, again, longer, other = (load(**fields)[0] for fields in ({}, {}, {"train_problems": 30}, {"seed": 2}))
    assert first == again
    assert (longer.train[:20], longer.heldout) == (first.train, first.heldout)
    assert other.heldout != first.heldout


@pytest.mark.parametrize("task", ["spell_backward", "countdown", "graph_color", "rubiks_cube", "zebra_puzzles"])
def test_the_verifier_scores_from_the_columns(task: str) -> None:
    """As in another process: from the entry as JSON."""
    from reasoning_gym import get_score_answer_fn

    (example, *_) = load(task=task, train_problems=2, eval_problems=1)[0].heldout
    entry = json.loads(example.columns["entry"])
    score = get_score_answer_fn(example.columns["task"])
    assert entry["question"] == example.prompt
    assert score("nonsense", entry) < 0.5
    if example.answer:  # Some tasks have no answer, only a verifier.
        assert score(example.answer, entry) == 1.0


def test_a_task_of_few_problems_gives_fewer_and_says_so() -> None:
    task, told = load(
        task="leg_counting",
        options={"min_animals": 1, "max_animals": 1, "min_instances": 1, "max_instances": 1},
        train_problems=200,
        eval_problems=10,
    )
    different = {e.prompt for e in task.train}
    assert different.isdisjoint(e.prompt for e in task.heldout)
    assert 0 < len(different) == len(task.train) < 200
    assert told == [
        f"data.task=leg_counting repeats itself: {len(different)} different training problems instead of 200"
    ]


def test_what_the_library_does_not_have_or_take() -> None:
    assert "reasoning-gym has no task 'spell_backwards' (data.task); did you mean 'spell_backward'?" in refused(
        task="spell_backwards"
    )
    assert "data.options does not suit data.task=spell_backward: " in refused(options={"max_word": 3})
    assert "data.options does not suit data.task=spell_backward: " in refused(
        options={"min_word_len": 9, "max_word_len": 3}
    )
    assert "data.task=arc_agi cannot be scored in another process" in refused(task="arc_agi")
    assert "data.options.seed is set by dppo itself" in refused(options={"seed": 3})
    assert "data.train_problems=0 breaks the rule" in refused(train_problems=0)


def test_without_the_library_the_command_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert refused() == "data=reasoning_gym needs the package reasoning-gym: pip install 'dppo[tasks]'"
