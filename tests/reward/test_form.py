"""The rewards of form: format and length."""

import make
import pytest
from helpers import composed

from dppo_cli.errors import ConfigError
from dppo_cli.reward.format import Format
from dppo_cli.reward.length import Length
from dppo_cli.types import Score


def formats(pattern: str, *texts: str) -> list[float | None]:
    scorer = Format(pattern).load(make.fail)
    return [score.value for score in scorer([make.prompt()], [[make.completion(text=text) for text in texts]])[0]]


def test_the_whole_response_has_to_match():
    assert formats("a+", "aaa", "aab", "baa", "") == [1.0, 0.0, 0.0, 0.0]


def test_the_pattern_of_the_yaml_wants_a_thought_and_an_answer():
    right = "<think>\nhm\n</think>\n<answer>\n46\n</answer>"
    texts = [right, right + "\n", "well: " + right, right + " done", right.replace("</think>", ""), "46"]
    assert formats(composed("train", "reward=format").reward.pattern, *texts) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]


def test_a_pattern_that_takes_forever():
    ((score,),) = Format("(a|aa)+").load(make.fail)([make.prompt()], [[make.completion(text="a" * 60 + "b")]])
    assert score == Score(None, note="reward.pattern took longer than 1 s on the response")


def test_the_penalty_of_dapo():
    """Eq. 13 with L_max = 20480 and L_cache = 4096, and its corners."""
    lengths = [1, 16384, 16385, 18432, 20480, 30000]
    scorer = Length(20480, 0.2).load(make.fail)
    ((*found,),) = scorer([make.prompt()], [[make.completion((5,) * length) for length in lengths]])
    assert [score.value for score in found] == pytest.approx([0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0])


def test_a_penalty_over_the_whole_length():
    ((*found,),) = Length(4, 1.0).load(make.fail)([make.prompt()], [[make.completion((5,) * n) for n in (1, 2, 4)]])
    assert [score.value for score in found] == [-0.25, -0.5, -1.0]


@pytest.mark.parametrize(
    ("make_option", "words"),
    [
        (lambda: Format("("), r"reward\.pattern='\(' is not a regular expression"),
        (lambda: Length(0, 0.2), r"reward\.max_length=0 breaks the rule max_length >= 1"),
        (lambda: Length(10, 0.0), r"reward\.share=0\.0 breaks the rule 0 < share <= 1"),
        (lambda: Length(10, 1.5), r"reward\.share=1\.5 breaks the rule"),
    ],
)
def test_options_out_of_range(make_option, words):
    with pytest.raises(ConfigError, match=words):
        make_option()
