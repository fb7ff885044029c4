"""The weighted sum of several rewards, each logged under its name."""

import make
import pytest

from dppo_cli.errors import ConfigError
from dppo_cli.reward.exact import Exact
from dppo_cli.reward.format import Format
from dppo_cli.reward.length import Length
from dppo_cli.reward.mixture import Mixture, MixtureScorer
from dppo_cli.types import Score

MEMBERS = {"answer": Exact(r"\d+"), "form": Format("<.*>"), "length": Length(10, 0.5)}


def scorer_of(*scores: Score):
    """A reward that gives these scores to the samples of each problem."""
    return lambda prompts, completions: [list(scores) for _ in prompts]


def test_the_parts_have_the_names_of_the_members_and_the_value_is_their_weighted_sum():
    mixture = Mixture(MEMBERS, {"answer": 2.0, "form": 0.5, "length": 1.0}).load(make.fail)
    completions = [[make.completion((1,) * 8, text="<46>"), make.completion(text="7")], []]
    (first, second), none = mixture([make.prompt(answer="46"), make.prompt(1)], completions)
    assert first == Score(2.0 + 0.5 - 0.6, {"answer": 1.0, "form": 1.0, "length": pytest.approx(-0.6)}, answer="46")
    assert second == Score(0.0, {"answer": 0.0, "form": 0.0, "length": 0.0}, answer="7")
    assert none == []


def test_weights_are_one_where_none_are_given():
    mixture = Mixture({"a": Exact(None), "b": Exact(None)}, None).load(make.fail)
    assert mixture([make.prompt(answer="7")], [[make.completion(text="7")]])[0][0].value == 2.0


def test_what_a_member_does_not_judge_is_left_out_of_the_sum():
    judged, not_judged = Score(0.5), Score(None, note="timed out")
    mixture = MixtureScorer({"a": scorer_of(judged, not_judged), "b": scorer_of(not_judged, not_judged)}, {"a": 3.0})
    ((first, second),) = mixture([make.prompt()], [[make.completion(), make.completion()]])
    assert first == Score(1.5, {"a": 0.5, "b": None}, note="b: timed out")
    assert second == Score(None, {"a": None, "b": None}, note="a: timed out; b: timed out")


def test_a_mixture_in_a_mixture_keeps_all_parts():
    mixture = Mixture({"inner": Mixture({"a": Exact(None)}, {"a": 2.0}), "b": Exact(None)}, None).load(make.fail)
    ((score,),) = mixture([make.prompt(answer="7")], [[make.completion(text="7")]])
    assert score == Score(3.0, {"inner": 2.0, "inner.a": 1.0, "b": 1.0}, answer="7")


@pytest.mark.parametrize(
    ("names", "weights", "words"),
    [
        ("", None, r"reward\.members is empty; add members, each a choice of reward: reward\.members\.answer=math"),
        ("ab", {"a": 1.0}, r"reward\.weights has no number for b; give one for each member"),
        ("ab", {"a": 1.0, "b": 1.0, "aa": 2.0}, r"reward\.weights\.aa is of no member; did you mean 'a'\?"),
        ("a", {"a": float("nan")}, r"breaks the rule weights are finite"),
    ],
)
def test_members_and_weights_that_do_not_match(names, weights, words):
    with pytest.raises(ConfigError, match=words) as error:
        Mixture({name: Exact(None) for name in names}, weights)
    assert "\n" not in str(error.value)
