"""The arithmetic task: every problem once, right answers, a split that never moves."""

import random
from typing import Any

import make
import pytest

from dppo_cli.data.arithmetic import Arithmetic, problems, split
from dppo_cli.errors import ConfigError

DEFAULT = (0, 99, "+-", "{a}{operation}{b}=")
KEYS: dict[str, Any] = {"operands": [0, 99], "operations": "+-", "template": "{a}{operation}{b}="}


def test_every_problem_is_listed_once_with_the_right_answer() -> None:
    everything = problems(*DEFAULT)
    assert len(everything) == len({p.prompt for p in everything}) == 20_000
    assert all(p.answer == str(eval(p.prompt.removesuffix("="))) for p in everything)
    answers = {p.prompt: p.answer for p in everything}
    assert answers["12+34="] == "46"
    assert answers["7-29="] == "-22"
    assert answers["99+99="] == "198"
    assert answers["5-5="] == "0"


def test_training_and_held_out_problems_are_disjoint_and_complete() -> None:
    train, heldout = ({p.prompt for p in part} for part in split())
    assert (len(train), len(heldout)) == (18_000, 2_000)
    assert not train & heldout
    assert train | heldout == {p.prompt for p in problems(*DEFAULT)}


def test_the_split_is_the_one_the_embedded_model_was_trained_with() -> None:
    """Another split would put problems that the shipped model has seen among the held-out ones."""
    train, heldout = split()
    assert [p.prompt for p in train[:4]] == ["0-47=", "14-77=", "38-74=", "37+89="]
    assert [p.prompt for p in heldout[:4]] == ["78-91=", "71+63=", "46+48=", "12-85="]


def test_the_split_depends_on_no_seed() -> None:
    before = split()
    split.cache_clear()
    random.seed(7)
    assert split() == before


@pytest.mark.parametrize("part", [0, 1])
def test_a_short_list_mixes_additions_and_subtractions(part: int) -> None:
    first = split()[part][:500]
    additions = sum("+" in p.prompt for p in first)
    assert 200 < additions < 300
    assert 0.15 < sum(p.answer.startswith("-") for p in first) / 500 < 0.35  # a quarter of all answers are negative


def test_load_gives_the_first_problems_of_each_part() -> None:
    train, heldout = split()
    task = Arithmetic(train_problems=30, eval_problems=10, **KEYS).load(print)
    assert task.train == train[:30]
    assert task.heldout == heldout[:10]
    everything = Arithmetic(train_problems=18_000, eval_problems=2_000, **KEYS).load(print)
    assert (everything.train, everything.heldout) == (train, heldout)


@pytest.mark.parametrize(
    ("train", "heldout", "wrong", "available", "instead"),
    [
        (18_001, 10, "data.train_problems=18001", 18_000, "data.train_problems=18000"),
        (0, 10, "data.train_problems=0", 18_000, "data.train_problems=1"),
        (10, 5_000, "data.eval_problems=5000", 2_000, "data.eval_problems=2000"),
        (10, -1, "data.eval_problems=-1", 2_000, "data.eval_problems=1"),
    ],
)
def test_a_number_of_problems_out_of_range_is_refused(
    train: int, heldout: int, wrong: str, available: int, instead: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Arithmetic(train_problems=train, eval_problems=heldout, **KEYS)
    assert str(caught.value) == f"{wrong}, but the arithmetic task has 1 to {available}; use {instead}"


def test_other_sums_in_other_words() -> None:
    source = Arithmetic(2_250, 250, operands=[1, 50], operations="+", template="What is {a} + {b}? Not {c}.")
    task = source.load(print)
    assert (len(task.train), len(task.heldout)) == (2_250, 250)
    assert {p.prompt for p in (*task.train, *task.heldout)} == {
        f"What is {a} + {b}? Not {{c}}." for a in range(1, 51) for b in range(1, 51)
    }
    for problem in task.heldout:
        a, b = problem.prompt.removeprefix("What is ").removesuffix("? Not {c}.").split(" + ")
        assert problem.answer == str(int(a) + int(b))
    assert not {p.prompt for p in task.train} & {p.prompt for p in task.heldout}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"operands": [5, 1]}, "data.operands=[5, 1] must be [lowest, highest]"),
        ({"operands": [1]}, "must be [lowest, highest]"),
        ({"operands": [0, 9999]}, "make 200000000 problems; 10 to 1000000 can be made"),
        ({"operations": "/"}, "data.operations=/ is an invalid value; write some of +-*, each once"),
        ({"operations": "++"}, "data.operations=++ is an invalid value; write some of"),
        ({"operations": ""}, "data.operations= is an invalid value; write some of"),
        ({"template": "{a}?"}, "data.template='{a}?' has no {b}"),
    ],
)
def test_a_task_that_cannot_be_made_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Arithmetic(10, 1, **{**KEYS, **changed})
    assert said in str(caught.value)


def test_products_beside_sums_and_differences() -> None:
    task = Arithmetic(270, 30, operands=[0, 9], operations="+-*", template="{a}{operation}{b}=").load(make.fail)
    answers = {example.prompt: example.answer for example in (*task.train, *task.heldout)}
    assert (answers["7*8="], answers["7+8="], answers["7-8="], len(answers)) == ("56", "15", "-1", 300)
