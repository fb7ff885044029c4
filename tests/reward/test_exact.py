"""The exact reward."""

import make
import pytest

from dppo_cli.errors import ConfigError
from dppo_cli.reward.exact import Exact
from dppo_cli.types import Score


def rewards(pattern: str | None, *pairs: tuple[str, str]) -> list[float | None]:
    """Of (response, answer) pairs, each a problem of its own."""
    prompts = [make.prompt(i, answer=answer) for i, (_, answer) in enumerate(pairs)]
    scores = Exact(pattern).load(make.fail)(prompts, [[make.completion(text=text)] for text, _ in pairs])
    return [score.value for (score,) in scores]


def test_the_samples_of_a_problem_are_scored_in_their_order():
    prompts = [make.prompt(0, answer="46"), make.prompt(1, answer="7"), make.prompt(2, answer="1")]
    completions = [[make.completion(text=text) for text in texts] for texts in (["46", "7", "46"], ["46"], [])]
    right, wrong = Score(1.0, answer="46"), Score(0.0, answer="7")
    assert Exact(None).load(make.fail)(prompts, completions) == [[right, wrong, right], [Score(0.0, answer="46")], []]


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


def test_a_match_without_its_group_is_no_answer():
    assert rewards(r"(\d+)?!", ("46!", "46"), ("oh!", "46"), ("oh!", "")) == [1.0, 0.0, 0.0]


def test_a_pattern_that_is_not_a_regular_expression():
    with pytest.raises(ConfigError, match=r"reward\.pattern='\(' is not a regular expression"):
        Exact("(")


def test_the_answer_that_was_found_is_kept_for_a_vote():
    ((found, none),) = Exact(r"\d+").load(make.fail)(
        [make.prompt(answer="7")], [[make.completion(text="3 or 46 "), make.completion(text="oh")]]
    )
    assert (found.answer, none.answer) == ("46", None)


def test_a_pattern_that_takes_forever_on_a_response_leaves_it_unjudged():
    ((slow, fast),) = Exact(r"(a|aa)+$").load(make.fail)(
        [make.prompt(answer="a")], [[make.completion(text="a" * 60 + "b"), make.completion(text="a")]]
    )
    assert slow == Score(None, note="reward.pattern took longer than 1 s on the response")
    assert fast == Score(1.0, answer="a")
