"""Mathematical equality, and responses that are meant to take forever."""

import time

import make
import pytest

from dppo_cli.errors import ConfigError
from dppo_cli.reward.math_answer import Math
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Score


def option(**changes) -> Math:
    """With the defaults of conf/reward/math.yaml."""
    return Math(**{"boxed_only": False, "timeout": 5.0, "default": 0.0, "workers": 2, "memory_gib": 4.0, **changes})


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return option(timeout=30.0).load(make.fail)


def score(scorer: Scorer, text: str, answer: str) -> Score:
    ((found,),) = scorer([make.prompt(answer=answer)], [[make.completion(text=text)]])
    return found


@pytest.mark.parametrize(
    ("text", "answer", "value"),
    [
        ("The answer is 46.", "46", 1.0),
        (r"so \boxed{0.5}", r"\frac12", 1.0),
        (r"so \boxed{\frac{2}{4}}", "1/2", 1.0),
        (r"\boxed{3}, no: 4", "3", 1.0),
        ("$1,234$", "1234", 1.0),
        (r"\boxed{x^2 + 2x + 1}", "(x+1)^2", 1.0),
        (r"\boxed{(1, 2)}", "(1,2)", 1.0),
        (r"\boxed{(2, 1)}", "(1,2)", 0.0),
        (r"\boxed{2\sqrt{3}}", r"$\sqrt{12}$", 1.0),
        (r"\boxed{47}", r"We find $x = 46$.", 0.0),
        (r"\boxed{x = 46}", r"\boxed{46}", 1.0),
    ],
)
def test_equal_answers(scorer, text, answer, value):
    assert score(scorer, text, answer).value == value


def test_the_answer_for_a_vote_is_the_same_however_it_is_written(scorer):
    found = [score(scorer, text, "1/2").answer for text in (r"\boxed{\frac12}", r"it is $\frac{1}{2}$", r"\boxed{1/2}")]
    assert found == ["1/2"] * 3


def test_no_answer_is_wrong_and_an_answer_that_cannot_be_read_is_not_judged(scorer):
    assert score(scorer, "I do not know", "46") == Score(0.0, note="no answer was found")
    assert score(scorer, "46", " ") == Score(None, note="the answer ' ' is not mathematics that can be read")


def test_only_a_box_counts_on_request():
    scorer = option(boxed_only=True, timeout=30.0).load(make.fail)
    assert [score(scorer, text, "46").value for text in ("it is 46", r"\boxed{46}")] == [0.0, 1.0]


def test_each_group_gets_its_own_scores(scorer):
    prompts = [make.prompt(i, answer=str(i)) for i in range(3)]
    completions = [[make.completion(text=t) for t in texts] for texts in (["0", "1"], [], ["5", "2", "2"])]
    found = scorer(prompts, completions)
    assert [[s.value for s in group] for group in found] == [[1.0, 0.0], [], [0.0, 1.0, 1.0]]


HOSTILE = {
    "deep": r"\boxed{" + "(" * 3000 + "1" + ")" * 3000 + "}",
    "tower": r"\boxed{9^{9^{9^9}}}",
    "exponent": r"\boxed{10^{1000000000}}",
    "factorial": r"\boxed{(10^9)!}",
    "digits": "1" * 100_000,
    "dollars": "$" * 100_000,
    "braces": r"\boxed{" + "{" * 50_000 + "}",
}


def test_hostile_answers_are_killed_in_time_and_the_others_are_scored():
    warnings: list[str] = []
    scorer = option(timeout=2.0, default=-0.5).load(warnings.append)
    texts = [*HOSTILE.values(), "46", r"\boxed{47}"]
    start = time.monotonic()
    (found,) = scorer([make.prompt(7, answer="46")], [[make.completion(text=text) for text in texts]])
    assert time.monotonic() - start < 120
    hostile = dict(zip(HOSTILE, found, strict=False))
    for name in ("deep", "tower", "exponent"):
        assert hostile[name] == Score(-0.5, note="it did not answer within 2 seconds")
    assert {score.value for score in hostile.values()} <= {0.0, -0.5}
    assert [score.value for score in found[-2:]] == [1.0, 0.0]
    (warning,) = warnings
    assert warning.startswith("the reward math failed on problem 7 ('")
    assert warning.endswith(f" more of {len(texts)} samples); scored as -0.5")


@pytest.mark.parametrize(
    ("field", "value"), [("timeout", 0.0), ("default", float("nan")), ("workers", 0), ("memory_gib", 0.0)]
)
def test_options_out_of_range(field, value):
    with pytest.raises(ConfigError, match=rf"reward\.{field}={value} breaks the rule .*{field}"):
        option(**{field: value})
