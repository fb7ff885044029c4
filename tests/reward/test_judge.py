"""A judge behind a server: what it is asked, what a verdict is worth; servers that are down, slow, busy or wrong."""

import time
from email.utils import formatdate
from typing import Any

import make
import pytest
from functions import values
from judges import Reply, option, said, scored

from dppo_cli.errors import ConfigError, RewardError
from dppo_cli.types import Score

# What is asked, and what is made of the answer


def test_what_the_judge_is_asked(server):
    template = "{prompt} {answer} {completion} {level} {{}}"
    judge = option(server.url, template=template, system="Be strict.", max_tokens=9, extra={"seed": 3})
    scores = judge.load(make.fail)([make.prompt(7, answer="46", level=2)], [[make.completion(text="{answer}?")]])
    assert values(scores) == [[1.0]]
    assert server.bodies == [
        {
            "model": "judge-1",
            "messages": [
                {"role": "system", "content": "Be strict."},
                {"role": "user", "content": "prompt 7 46 {answer}? 2 {}"},
            ],
            "temperature": 0.0,
            "max_tokens": 9,
            "seed": 3,
        }
    ]
    assert "Authorization" not in server.headers[0]


def test_the_template_of_the_yaml_shows_all_three(server):
    assert scored(option(server.url), "I say 46") == [Score(1.0)]
    asked = server.bodies[0]["messages"][0]["content"]
    assert "Question: prompt 7" in asked and "answer: 46" in asked and "\nI say 46\n" in asked


@pytest.mark.parametrize(
    ("text", "options", "value"),
    [
        ("Good. Verdict: yes", {}, 1.0),
        ("verdict: **No**", {}, 0.0),
        ("Verdict: yes, no: Verdict: no", {}, 0.0),
        ("Score: 7 of 10", {"verdict": r"Score: (\S+)", "scale": 10.0}, 0.7),
        ("[[-2.5]]", {"verdict": r"\[\[(.*?)\]\]"}, -2.5),
    ],
)
def test_what_a_verdict_is_worth(server, text, options, value):
    server.reply = lambda body, number: said(text)
    assert scored(option(server.url, **options), "46") == [Score(value)]


@pytest.mark.parametrize(
    ("text", "verdict", "note"),
    [
        ("I cannot say.", "Verdict: (yes|no)", "it gave no verdict: 'I cannot say.'"),
        ("Verdict: maybe", "Verdict: (.*)", "its verdict 'maybe' is neither yes, no nor a number"),
        ("Verdict: inf", "Verdict: (.*)", "its verdict 'inf' is neither yes, no nor a number"),
    ],
)
def test_no_verdict_is_not_zero(server, text, verdict, note):
    server.reply = lambda body, number: said(text)
    warnings: list[str] = []
    assert scored(option(server.url, verdict=verdict), "46", warn=warnings.append) == [Score(None, note=note)]
    assert warnings == [f"the judge judge-1 failed on problem 7 ('46'): {note}; scored as not judged"]
    assert scored(option(server.url, verdict=verdict, default=-1.0), "46", warn=warnings.append) == [
        Score(-1.0, note=note)
    ]
    assert warnings[1].endswith("; scored as -1.0")


def test_each_sample_gets_its_own_verdict_and_equal_ones_are_asked_once(server):
    server.reply = lambda body, number: said("Verdict: " + ("yes" if "right" in str(body) else "no"))
    prompts = [make.prompt(i) for i in range(3)]
    texts = [["right", "wrong", "right"], [], ["wrong", "right"]]
    found = option(server.url).load(make.fail)(prompts, [[make.completion(text=t) for t in row] for row in texts])
    assert values(found) == [[1.0, 0.0, 1.0], [], [0.0, 1.0]]
    assert len(server.bodies) == 4


def test_so_many_at_once(server):
    def reply(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.1)
        return said("Verdict: yes")

    server.reply = reply
    scored(option(server.url, concurrency=3), *map(str, range(9)))
    assert server.most_at_once == 3


def test_so_many_a_minute(server):
    scored(option(server.url, requests_per_minute=600.0), *map(str, range(4)))
    assert server.times[-1] - server.times[0] > 0.25


# The key


def test_the_key_comes_from_the_environment_and_is_sent_only(server, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-123")
    assert scored(option(server.url, api_key_env="JUDGE_KEY"), "46") == [Score(1.0)]
    assert server.headers[0]["Authorization"] == "Bearer sk-123"
    server.reply = lambda body, number: (401, {}, {"error": {"message": "sk-123 is\nno key"}})
    with pytest.raises(RewardError) as error:
        scored(option(server.url, api_key_env="JUDGE_KEY"), "46")
    assert str(error.value) == (
        f"the judge at {server.url}/chat/completions refuses: it answered 401 *** is no key (its key is in the "
        "variable that reward.api_key_env names)"
    )
    assert len(server.bodies) == 2, "it is not asked again"


def test_a_key_that_is_not_there(server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match=r"reward\.api_key_env=JUDGE_KEY, but the environment has no such variable"):
        scored(option(server.url, api_key_env="JUDGE_KEY"), "46")


# Servers


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, status):
    server.reply = lambda body, number: said("Verdict: yes") if number == 2 else (status, {}, "busy")
    assert scored(option(server.url), "46") == [Score(1.0)]
    assert len(server.bodies) == 3


@pytest.mark.parametrize("header", ["1", "date"])
def test_a_server_says_when_to_come_back(server, header):
    def reply(body: dict[str, Any], number: int) -> Reply:
        after = header if header == "1" else formatdate(time.time() + 2, usegmt=True)
        return said("Verdict: yes") if number else (429, {"Retry-After": after}, "")

    server.reply = reply
    assert scored(option(server.url), "46") == [Score(1.0)]
    assert server.times[1] - server.times[0] > 0.9


def test_a_server_that_does_not_answer_in_time(server):
    def reply(body: dict[str, Any], number: int) -> Reply:
        time.sleep(0.5 if "slow" in str(body) else 0)
        return said("Verdict: yes")

    server.reply = reply
    warnings: list[str] = []
    slow, fast = scored(option(server.url, timeout=0.2, retries=1), "slow", "46", warn=warnings.append)
    assert (slow, fast) == (Score(None, note="it did not answer within 0.2 seconds, 2 times"), Score(1.0))
    assert len(warnings) == 1


def test_a_server_that_is_down_for_good_ends_the_run_in_words():
    judge = option("http://127.0.0.1:9/v1", retries=1, max_failures=3)
    warnings: list[str] = []
    start = time.monotonic()
    with pytest.raises(RewardError) as error:
        scored(judge, *map(str, range(9)), warn=warnings.append)
    assert time.monotonic() - start < 10
    text = str(error.value)
    assert text.startswith("the judge judge-1 failed on problem 7 ('2'): it cannot be reached (")
    assert text.endswith(", 2 times; that is reward.max_failures=3 times in a row")
    assert "\n" not in text and len(warnings) == 2


def test_failures_in_a_row_are_counted_from_one_that_succeeds_on(server):
    server.reply = lambda body, number: said("Verdict: yes" if "good" in str(body["messages"]) else "hm")
    warnings: list[str] = []
    texts = ["1", "good 1", "2", "good 2", "3"]
    found = scored(option(server.url, max_failures=2, template="{completion}"), *texts, warn=warnings.append)
    assert [score.value for score in found] == [None, 1.0, None, 1.0, None]


@pytest.mark.parametrize(
    ("reply", "note"),
    [
        ((200, {}, "<html>"), "its answer is no chat completion: '<html>'"),
        ((200, {}, {"choices": []}), "its answer is no chat completion: '{\"choices\": []}'"),
        ((200, {}, {"choices": [{"message": {"content": None}}]}), "its answer has no text"),
        ((400, {}, {"error": {"message": "too long"}}), "it answered 400 too long"),
        ((302, {"Location": "http://127.0.0.1:9/"}, ""), "it answered 302"),
    ],
)
def test_an_answer_that_is_none_is_not_asked_for_again(server, reply, note):
    server.reply = lambda body, number: reply
    assert scored(option(server.url), "46", warn=lambda text: None) == [Score(None, note=note)]
    assert len(server.bodies) == 1


def test_a_wrong_address_ends_the_run(server):
    server.reply = lambda body, number: (404, {}, "")
    with pytest.raises(RewardError, match=r"chat/completions refuses: it answered 404$"):
        scored(option(server.url), "46")
