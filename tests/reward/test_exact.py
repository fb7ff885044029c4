"""The exact reward."""

import make
import pytest

from dppo_cli.errors import ConfigError
from dppo_cli.reward.exact import Exact


def rewards(pattern: str | None, *pairs: tuple[str, str]) -> list[float]:
    return Exact(pattern).load()([make.completion(text=text, answer=answer) for text, answer in pairs])


def test_without_a_pattern_the_whole_response_counts():
    pairs = [("46", "46"), (" 46\n", "46"), ("46", " 46 "), ("4 6", "46"), ("46.", "46"), ("", "46"), ("", "")]
    assert rewards(None, *pairs) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_last_match_counts():
    pairs = [("first 3, then 46", "46"), ("46, no: 3", "46"), ("none", "46"), ("-46", "46"), ("-46", "-46")]
    assert rewards(r"-?\d+", *pairs) == [1.0, 0.0, 0.0, 0.0, 1.0]


def test_the_first_group_is_compared_where_there_is_one():
    boxed = r"answer: *(\S+?)(\.|$)"
    assert rewards(boxed, ("answer: 46.", "46"), ("answer:  46", "46"), ("46", "46")) == [1.0, 1.0, 0.0]


def test_white_space_around_a_match_does_not_count():
    assert rewards(r"#(.*)#", ("# 46 #", "46"), ("#46#", " 46")) == [1.0, 1.0]


def test_a_match_whose_group_took_no_part_is_no_answer():
    assert rewards(r"(\d+)?!", ("46!", "46"), ("oh!", "46"), ("oh!", "")) == [1.0, 0.0, 0.0]


def test_a_pattern_that_is_none():
    with pytest.raises(ConfigError, match=r"reward\.pattern='\(' is no regular expression"):
        Exact("(")
