"""The estimators of an evaluation, against counting by hand."""

import json
import math
from collections.abc import Iterator, Sequence
from hashlib import sha256
from itertools import combinations
from statistics import stdev
from typing import Any

import make
import pytest

from dppo_cli.config.sections import Sampling
from dppo_cli.training.evaluation import EvalResult, check_measured, compared, evaluate, fingerprint, pass_at_k
from dppo_cli.training.intervals import accuracy_interval
from dppo_cli.types import Completion, Example, Group, Prompt, Score


def evaluation(rewards: list[float | None], samples_per_prompt: int, success_reward: float = 1.0) -> EvalResult:
    """Of equally many samples of each problem; None is a sample that was not judged."""
    rows = [rewards[i : i + samples_per_prompt] for i in range(0, len(rewards), samples_per_prompt)]
    return EvalResult([group(i, row) for i, row in enumerate(rows)], success_reward)


def group(index: int, rewards: Sequence[float | None]) -> Group:
    return Group(make.prompt(index), [make.completion()] * len(rewards), [Score(r) for r in rewards])


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations(range(n), k))
            share = sum(any(i < right for i in draw) for draw in draws) / len(draws)
            assert pass_at_k(n, right, k) == pytest.approx(share, abs=1e-12)


def test_pass_at_k_of_many_samples_does_not_overflow() -> None:
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5)
    assert pass_at_k(2000, 2000, 1) == 1.0
    assert pass_at_k(2000, 0, 2000) == 0.0


def test_figures_by_hand() -> None:
    result = evaluation([1.0, 0.5, 0.0, 1.0, 1.0, 2.0, 0.0, 0.0, 0.99], samples_per_prompt=3)
    assert result.judged == [[True, False, False], [True, True, True], [False, False, False]]
    assert result.samples == 9
    assert result.accuracy == pytest.approx(4 / 9)
    assert result.pass_at(1) == pytest.approx(4 / 9)
    # One of three right: two of the three pairs hold it.
    assert result.pass_at(2) == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert result.pass_at(3) == pytest.approx(2 / 3)
    assert result.standard_error() == pytest.approx(stdev([1 / 3, 1, 0]) / math.sqrt(3))


def test_what_counts_as_right_is_the_users_choice() -> None:
    rewards = [0.2, 0.5, 0.7, 1.0]
    assert evaluation(rewards, 1, success_reward=0.5).accuracy == 0.75
    assert evaluation(rewards, 1, success_reward=0.1).accuracy == 1.0


def test_samples_that_were_not_judged_count_for_nothing() -> None:
    assert evaluation([1.0, None, 0.0, None], 1).accuracy == 0.5
    assert evaluation([None], 1).accuracy is None
    part = evaluation([1.0, None, 0.0, 0.0, None, None], 2)
    assert part.accuracy == pytest.approx(1 / 3)
    assert part.pass_at(1) == pytest.approx(1 / 2), "the first problem by its one judged sample, the second by two"
    assert part.pass_at(2) == 0.0, "only the second problem has two judged samples"
    assert part.standard_error() == pytest.approx(stdev([1, 0]) / math.sqrt(2))
    assert evaluation([1.0, None], 2).pass_at(2) is None


def test_a_sample_that_was_not_judged_is_not_right_whatever_is_asked() -> None:
    assert not evaluation([], 1, success_reward=-math.inf).correct(Score(None, note="timed out"))


def test_problems_may_have_different_numbers_of_samples() -> None:
    result = EvalResult([group(0, [1.0, 0.0, 0.0]), group(1, [1.0]), group(2, [])], success_reward=1.0)
    assert result.samples == 4
    assert result.accuracy == pytest.approx(2 / 4)
    assert result.pass_at(1) == pytest.approx((1 / 3 + 1) / 2)
    assert result.pass_at(2) == pytest.approx(2 / 3), "only the first problem has two samples"
    assert result.standard_error() == pytest.approx(stdev([1 / 3, 1]) / math.sqrt(2))


def test_the_standard_error_of_equal_samples_is_that_of_the_problems() -> None:
    """Four copies of each sample say no more than one."""
    once, often = evaluation([1.0, 0.0, 0.0], 1), evaluation([1.0] * 4 + [0.0] * 8, 4)
    assert often.standard_error() == pytest.approx(once.standard_error()) == pytest.approx(1 / 3)
    assert evaluation([1.0], 1).standard_error() is None


def test_each_problem_keeps_its_samples_and_scores() -> None:
    class Engine:
        def generate(self, prompts: Sequence[Prompt], *asked: Any) -> Iterator[tuple[int, list[Completion]]]:
            assert asked == (2, sampling, 0, 7), "two samples, no list of log-probs, the seed as it was given"
            return enumerate([make.completion(text=f"{p.index}{n}") for n in range(2)] for p in prompts)

    def scorer(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
        return [[Score(float(c.text)) for c in row] for row in completions]

    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=8, stop=[])
    prompts = [make.prompt(3), make.prompt(5)]
    engine: Any = Engine()
    result = evaluate(engine, prompts, scorer, sampling, samples_per_prompt=2, success_reward=50.0, seed=7)
    assert [g.prompt for g in result.groups] == prompts
    assert [[s.value for s in g.scores] for g in result.groups] == [[30.0, 31.0], [50.0, 51.0]]
    assert result.accuracy == 0.5


def voting(*problems: str) -> EvalResult:
    """A letter a sample: its answer, right if it is a capital; `-` is a sample without an answer."""
    groups = [
        Group(
            make.prompt(i),
            [make.completion()] * len(row),
            [Score(float(c.isupper()), answer=None if c == "-" else c) for c in row],
        )
        for i, row in enumerate(problems)
    ]
    return EvalResult(groups, success_reward=1.0)


def test_a_majority_by_hand() -> None:
    assert voting("AAb", "abB", "ccC").majority_at(3) == pytest.approx((1 + 1 / 3 + 0) / 3), "ties share the vote"
    assert voting("AAb").majority_at(1) == pytest.approx(2 / 3), "of one sample it is the accuracy"
    assert voting("AbbAA").majority_at(2) == pytest.approx((0.5 + 0.5) / 2), "two runs of two; the fifth is left over"
    assert voting("--A", "---").majority_at(3) == pytest.approx(1 / 2), "what has no answer has no vote"
    assert voting("AB", "c").majority_at(2) == 1.0, "only the first problem has two samples, and both are right"
    assert voting("---").majority_at(3) is None, "a reward without answers has no majority"
    assert voting("A").majority_at(2) is None


def test_rates_keep_the_place_of_each_problem() -> None:
    result = EvalResult([group(0, [1.0, 0.0]), group(1, [None]), group(2, []), group(3, [1.0, None])], 1.0)
    assert result.rates == [0.5, None, None, 1.0]
    assert result.interval() == accuracy_interval([1, 1], [2, 1])


def test_figures_are_what_a_summary_holds() -> None:
    assert evaluation([1.0, 0.0, 0.0, 0.0], 2).figures([1, 2]) == {
        "problems": 2,
        "samples": 4,
        "accuracy": 0.25,
        "standard_error": 0.25,
        "interval": (0.0, 0.5),
        "pass_at": {"1": 0.25, "2": 0.5},
        "majority_at": {"1": None, "2": None},
    }


def test_a_comparison_before_and_after() -> None:
    before = {"held_out": measured([0.0, 0.0, 1.0]), "more": measured([1.0])}
    after = {"held_out": measured([1.0, 0.0, 1.0]), "more": measured([0.0])}
    found = compared(before, after)
    assert (found["eval_before"], found["eval_after"], found["eval_problems"]) == (1 / 3, 2 / 3, 3)
    assert found["evaluations"]["held_out"]["difference"]["mean"] == pytest.approx(1 / 3)
    assert found["evaluations"]["held_out"]["difference"]["problems"] == 3
    assert found["evaluations"]["more"]["difference"] == {"mean": -1.0, "interval": None, "problems": 1}
    shown = evaluation([0.0], 1).figures()
    assert found["evaluations"]["more"]["after"] == shown, "neither rates nor fingerprint"
    half = compared(before, None)
    assert (half["eval_before"], half["eval_after"]) == (1 / 3, None)
    assert half["evaluations"]["more"]["after"] is half["evaluations"]["more"]["difference"] is None
    assert compared(None, None)["eval_before"] is None


def as_json(found: Any) -> Any:
    return json.loads(json.dumps(found))


def test_what_an_evaluation_gives_is_taken_from_a_checkpoint() -> None:
    for found in (measured([0.0, 1.0, 1.0]), measured([1.0]), measured([])):
        check_measured(as_json({"held_out": found, "more": found}))
    check_measured({})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("accuracy", 2),
        ("accuracy", -0.5),
        ("accuracy", True),
        ("accuracy", math.nan),
        ("accuracy", []),
        ("standard_error", {"a": 1}),
        ("interval", [0.5]),
        ("interval", 0.5),
        ("interval", ""),
        ("interval", [None, "x"]),
        ("pass_at", {"x": 0.5}),
        ("pass_at", {"1": [1]}),
        ("majority_at", None),
        ("rates", {}),
        ("rates", [0.0, 1.0]),
        ("rates", [0.0, 1.0, "x"]),
        ("problems", 2),
        ("samples", 1.5),
        ("samples", True),
        ("fingerprint", 5),
    ],
)
def test_what_no_evaluation_gives_is_not(key: str, value: Any) -> None:
    found = as_json(measured([0.0, 1.0, 1.0]))
    with pytest.raises((ValueError, TypeError, AttributeError)):
        check_measured({"held_out": {**found, key: value}})


def measured(rates: list[float]) -> dict[str, Any]:
    result = evaluation(list(rates), 1)
    return {**result.figures(), "rates": result.rates, "fingerprint": "4624224b588a6e52"}


def test_a_fingerprint_is_of_texts_answers_and_their_order() -> None:
    problems = [Example("1+2=", "3"), Example("é", "\ud800")]

    def of(examples: Sequence[Example]) -> str:
        return fingerprint([Prompt(i, example, (3,)) for i, example in enumerate(examples)])

    # By hand: SHA-256 of a line of JSON for each problem.
    lines = '["1+2=", [], "3"]\n["\\u00e9", [], "\\ud800"]\n'
    assert of(problems) == sha256(lines.encode()).hexdigest()[:16]
    said, other = ({"role": "user", "content": text} for text in ("1+2=", "2+1="))
    changed = [
        problems[::-1],
        problems[:1],
        [*problems, problems[0]],
        [Example("1+2= ", "3"), problems[1]],
        [Example("1+2=", "4"), problems[1]],
        [Example("1+2=", "3", messages=[said]), problems[1]],
        [Example("1+2=", "3", messages=[other, said]), problems[1]],
    ]
    assert len({of(problems), *map(of, changed)}) == 8
    assert of([]) == sha256(b"").hexdigest()[:16]
    turned = {"content": "1+2=", "role": "user"}
    assert of([Example("1+2=", "3", {"level": 1}, [turned])]) == of([Example("1+2=", "3", {}, [said])])
