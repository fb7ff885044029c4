"""What a judge costs, and options that it cannot have."""

import make
import pytest
from functions import values
from judges import option, said, scored

from dppo_cli.errors import ConfigError, RewardError


def test_answers_are_kept_on_disk(server, tmp_path):
    judge = option(server.url, cache=str(tmp_path / "cache"))
    for _ in range(2):
        assert [score.value for score in scored(judge, "46", "47")] == [1.0, 1.0]
    assert len(server.bodies) == 2
    scored(option(server.url, cache=str(tmp_path / "cache"), temperature=0.5), "46")
    assert len(server.bodies) == 3, "another request"
    kept = sorted((tmp_path / "cache").rglob("*.json"))
    assert len(kept) == 3 and not list((tmp_path / "cache").rglob("tmp*"))
    kept[0].write_text("{")
    scored(option(server.url, cache=str(tmp_path / "cache"), temperature=0.5), "46")
    scored(judge, "46", "47")
    assert len(server.bodies) == 4, "what cannot be read is asked for again"


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RewardError, match=r"reward\.cache=.*/file cannot be written: Not a directory"):
        scored(option(server.url, cache=str(tmp_path / "file")), "46")


def test_so_many_requests_end_the_run(server):
    judge = option(server.url, max_requests=3, concurrency=1).load(make.fail)
    prompt, completions = make.prompt(), [[make.completion(text=text) for text in "123"]]
    assert values(judge([prompt], completions)) == [[1.0, 1.0, 1.0]]
    with pytest.raises(RewardError, match=r"was asked reward\.max_requests=3 times; raise it to go on"):
        judge([prompt], [[make.completion(text="4")]])
    assert len(server.bodies) == 3


def test_so_many_tokens_end_the_run(server):
    server.reply = lambda body, number: said("Verdict: yes", tokens=60)
    judge = option(server.url, max_total_tokens=100, concurrency=1).load(make.fail)
    with pytest.raises(RewardError, match=r"used 120 tokens, and reward\.max_total_tokens=100; raise it to go on"):
        judge([make.prompt()], [[make.completion(text=text) for text in "123"]])
    assert len(server.bodies) == 2


# Options


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "{prompt}"}, r"reward\.template does not show the response; write \{completion\}"),
        ({"template": "{completion} {"}, r"reward\.template cannot be read \(.*\); write \{\{ and \}\} for braces"),
        ({"template": "{completion.text}"}, r"reward\.template holds \{completion\.text\}; write \{completion\}"),
        ({"template": "{completion!r}"}, r"reward\.template holds \{completion\}"),
        ({"verdict": "("}, r"reward\.verdict='\(' is not a regular expression"),
        ({"scale": 0.0}, r"reward\.scale=0\.0 breaks the rule"),
        ({"retries": -1}, r"reward\.retries=-1 breaks the rule retries >= 0"),
        ({"concurrency": 0}, r"reward\.concurrency=0 breaks the rule"),
        ({"timeout": float("inf")}, r"reward\.timeout=inf breaks the rule"),
        ({"requests_per_minute": 0.0}, r"reward\.requests_per_minute=0\.0 breaks the rule"),
        ({"url": "localhost:8000"}, r"reward\.url=localhost:8000 is no address; write http://host:port/v1"),
        ({"url": "http://me:secret@host/v1"}, r"^reward\.url holds a password; leave it out"),
        ({"extra": {"model": "x"}}, r"reward\.extra\.model is set by dppo itself"),
    ],
)
def test_options_that_cannot_be(changes, words):
    with pytest.raises(ConfigError, match=words) as error:
        option(**{"url": "http://localhost/v1", **changes})
    assert "secret" not in str(error.value)


def test_a_template_that_shows_a_column_that_is_not_there(server):
    with pytest.raises(RewardError, match=r"shows \{levle\}, which no column is called; did you mean 'level'\?"):
        option(server.url, template="{completion} {levle}").load(make.fail)(
            [make.prompt(level=1)], [[make.completion(text="46")]]
        )
