"""The rewards that compare numbers: numeric and gsm8k."""

from decimal import Decimal

import make
import pytest

from dppo_cli.errors import ConfigError
from dppo_cli.reward.gsm8k import GSM8K
from dppo_cli.reward.numbers_in_text import last_number, value_of, written
from dppo_cli.reward.numeric import Numeric
from dppo_cli.types import Score


def scores(option, *pairs: tuple[str, str]) -> list[Score]:
    """Of (response, answer) pairs, each a problem of its own."""
    prompts = [make.prompt(i, answer=answer) for i, (_, answer) in enumerate(pairs)]
    return [score for (score,) in option.load(make.fail)(prompts, [[make.completion(text=text)] for text, _ in pairs])]


@pytest.mark.parametrize(
    ("text", "number", "value"),
    [
        ("it is 46.", "46", 46),
        ("first 3, then -46", "-46", -46),
        ("3-46", "46", 46),
        ("x-1 (2)-3", "3", 3),
        ("−5 degrees", "−5", -5),
        ("$1,234.50 in all", "$1,234.50", "1234.5"),
        ("-$7", "-$7", -7),
        ("1,2345", "2345", 2345),
        ("1,234,567", "1,234,567", 1234567),
        ("about .5", ".5", "0.5"),
        ("1.5e-3 m", "1.5e-3", "0.0015"),
        ("half: 1/2", "1/2", "0.5"),
        ("0.25/0.5", "0.25/0.5", "0.5"),
        ("30% of it", "30%", 30),
    ],
)
def test_the_last_number_of_a_text(text, number, value):
    assert last_number(text) == number
    assert value_of(number) == Decimal(value)


@pytest.mark.parametrize("text", ["", "none", "1/0", "1 2", "NaN", "inf", "1e99999", "9" * 401, "0x10", "1__0"])
def test_what_is_no_number(text):
    assert value_of(text) is None


def test_equal_numbers_are_written_alike_for_a_vote():
    alike = [["46", "46.0", "0046", "4.6e1"], ["-0.5", "-.50", "-1/2"], ["0", "-0.00"], ["1200", "1.2e3"]]
    assert [{written(value_of(text)) for text in texts} for texts in alike] == [{"46"}, {"-0.5"}, {"0"}, {"1200"}]
    assert written(Decimal("1e999")) == "1e999"
    assert written(Decimal("1e-999")) == "1e-999"
    assert written(Decimal("0.001")) == "0.001"
    digits = "1234567890" * 5
    assert written(Decimal(digits)) == digits.rstrip("0") + "0"


def test_numeric_compares_values():
    option = Numeric(None, 0.0, 0.0)
    pairs = [("so 1,234.50", "1234.5"), ("46", "46.0"), ("46.01", "46"), ("nothing", "46"), ("1e400", "2e400")]
    right, same, near, none, huge = scores(option, *pairs)
    assert [s.value for s in (right, same, near, none, huge)] == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert (right.answer, near.answer, none.answer) == ("1234.5", "46.01", None)
    assert none.note == "no number was found"


def test_numeric_compares_within_a_tolerance():
    pairs = [("101", "100"), ("102", "100"), ("0.001", "0")]
    assert [s.value for s in scores(Numeric(None, 0.01, 0.0), *pairs)] == [1.0, 0.0, 0.0]
    assert [s.value for s in scores(Numeric(None, 0.0, 0.01), *pairs)] == [0.0, 0.0, 1.0]


def test_numeric_looks_in_the_last_match_of_its_pattern():
    pairs = [("answer: 46 (of 100)", "46"), ("answer: 3, answer: 46 m", "46"), ("46", "46")]
    assert [s.value for s in scores(Numeric(r"answer: (\S+)", 0.0, 0.0), *pairs)] == [1.0, 1.0, 0.0]


def test_a_problem_whose_answer_is_no_number_is_not_judged_and_told_of_once():
    warnings: list[str] = []
    prompts = [make.prompt(i, answer=answer) for i, answer in enumerate(["ten", "x", "7"])]
    completions = [[make.completion(text="7"), make.completion(text="8")]] * 3
    found = Numeric(None, 0.0, 0.0).load(warnings.append)(prompts, completions)
    note = "the answer 'ten' of problem 0 is not a number"
    assert found[0] == [Score(None, note=note)] * 2
    assert [score.value for score in found[2]] == [1.0, 0.0]
    assert warnings == [f"{note}; it is not judged, nor are others like it"]


def test_gsm8k_strict_takes_the_number_behind_the_mark():
    solution = "Natalia sold 48/2 = 24 clips.\n#### 72"
    pairs = [("... #### 72", solution), ("####72.", "72"), ("72", "72"), ("#### $1,072", "1072"), ("#### x 72", "72")]
    assert [s.value for s in scores(GSM8K("strict"), *pairs)] == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert scores(GSM8K("strict"), ("#### 3 #### 72.00", solution)) == [Score(1.0, answer="72")]


def test_gsm8k_flexible_takes_the_last_number():
    pairs = [("it is 72", "#### 72"), ("#### 72 of 100", "72")]
    assert [s.value for s in scores(GSM8K("flexible"), *pairs)] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("make_option", "words"),
    [
        (lambda: GSM8K("loose"), r"reward\.extract=loose is an invalid value"),
        (lambda: Numeric("(", 0.0, 0.0), r"reward\.pattern='\(' is not a regular expression"),
        (lambda: Numeric(None, 1.0, 0.0), r"reward\.relative_tolerance=1\.0 breaks the rule"),
        (lambda: Numeric(None, 0.0, -1.0), r"reward\.absolute_tolerance=-1\.0 breaks the rule"),
    ],
)
def test_options_out_of_range(make_option, words):
    with pytest.raises(ConfigError, match=words):
        make_option()
