"""Equations that reach a target with given numbers."""

from fractions import Fraction

import make
import pytest

from dppo_cli.errors import ConfigError
from dppo_cli.reward.countdown import Countdown, evaluated
from dppo_cli.types import Score


def scores(*texts: str, use_all: bool = True, **columns: object) -> list[Score]:
    row = {"nums": [3, 3, 8, 8], "target": 24, **columns}
    scorer = Countdown("nums", "target", "(?s)<answer>(.*?)</answer>", use_all).load(make.fail)
    texts = [f"Hm. <answer>{text}</answer>" for text in texts]
    return scorer([make.prompt(**row)], [[make.completion(text=text) for text in texts]])[0]


def test_an_equation_is_right_exactly_where_it_reaches_the_target_with_all_numbers():
    texts = [
        "8 / (3 - 8/3)",
        "8/(3-8/3) = 24",
        "8 ÷ (3 − 8 ÷ 3)",
        "8 + 8 + 3 + 3",
        "3 * 8",
        "3*8 + 3 - 3 + 8 - 8",
        "24",
    ]
    assert [score.value for score in scores(*texts)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert scores("8/(3-8/3) = 24") == [Score(1.0, answer="8/(3-8/3)")]
    assert scores("3 * 8")[0].note == "it does not use the numbers once each"


def test_numbers_may_be_left_over_on_request():
    assert [score.value for score in scores("3 * 8", "8 + 8 + 8", use_all=False)] == [1.0, 0.0]


@pytest.mark.parametrize("numbers", ["3 3 8 8", "[3, 3, 8, 8]", (3, 3, 8, 8)])
def test_numbers_may_be_text(numbers):
    assert scores("8 / (3 - 8/3)", nums=numbers, target="24")[0].value == 1.0


def test_a_row_without_numbers_is_not_judged():
    note = "the row has no nums and target"
    assert scores("1", nums=None) == scores("1", target=None) == [Score(None, note=note)]


def test_a_response_without_an_expression_is_wrong():
    scorer = Countdown("nums", "target", "<answer>(.*?)</answer>", True).load(make.fail)
    ((score,),) = scorer([make.prompt(nums=[1], target=1)], [[make.completion(text="1")]])
    assert score == Score(0.0, note="no expression was found")


@pytest.mark.parametrize(("text", "value"), [("1/3 + 1/3 + 1/3", 1), ("-(2 - 5) * +4", 12), ("[1 + {2}] × 3", 9)])
def test_values_are_exact(text, value):
    assert evaluated(text)[0] == Fraction(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("9**9**9**9", "not one of whole numbers"),
        ("__import__('os').abort()", "not one of whole numbers"),
        ("1 if 2 else 3", "not one of whole numbers"),
        ("1.5 * 2", "not one of whole numbers"),
        ("True + 1", "not one of whole numbers"),
        ("'3' * 8", "not one of whole numbers"),
        ("5(3)", "not one of whole numbers"),
        ("x", "not one of whole numbers"),
        ("1 +", "cannot be read"),
        ("", "cannot be read"),
        ("007", "cannot be read"),
        ("1 / (3 - 3)", "divides by zero"),
        ("(" * 150 + "1", "cannot be read"),
        ("-" * 190 + "1", None),
        ("1" * 201, "longer than 200 characters"),
        ("1\x00", "cannot be read"),
    ],
)
def test_nothing_but_arithmetic_is_evaluated(text, words):
    if words is None:
        assert evaluated(text)[0] == 1
        return
    with pytest.raises(ValueError, match=words):
        evaluated(text)


def test_a_pattern_that_is_not_a_regular_expression():
    with pytest.raises(ConfigError, match=r"reward\.pattern='\(' is not a regular expression"):
        Countdown("nums", "target", "(", True)
