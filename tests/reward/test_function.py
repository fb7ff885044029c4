"""The user's reward function: how it is found, what it gets, what it may return."""

import json
import random
import sys
from pathlib import Path

import make
import pytest
from functions import function

from dppo_cli.errors import ConfigError, RewardError
from dppo_cli.types import Score

PROMPTS = [make.prompt(3, answer="46", level=1), make.prompt(4, answer="7", level=2, source="book")]
COMPLETIONS = [[make.completion(text="46")], [make.completion(text="oh")]]


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Writes a module into the folder where dppo was started and gives its scores of COMPLETIONS."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str, path: str = "my_reward.py:score") -> list[float | None]:
        file = path.split(":")[0]
        (tmp_path / (file if file.endswith(".py") else f"{file}.py")).write_text(source)
        return [score.value for (score,) in function(path).load(make.fail)(PROMPTS, COMPLETIONS)]

    return write


LENGTHS = """
def score(prompts, completions, answer, **columns):
    return [len(c) + len(a) / 10 for c, a in zip(completions, answer)]
"""


def test_a_function_in_a_file(written):
    assert written(LENGTHS) == pytest.approx([2.2, 2.1])


def test_a_function_in_a_module(written, monkeypatch):
    monkeypatch.delitem(sys.modules, "module_reward", raising=False)
    assert written(LENGTHS, "module_reward:score") == pytest.approx([2.2, 2.1])
    assert function("operator:not_").load(make.fail) is not None


def test_an_absolute_path_and_a_dataclass_in_the_file(written, tmp_path):
    source = "from dataclasses import dataclass\n@dataclass\nclass R:\n    x: 'float'\n" + LENGTHS
    assert written(source, f"{tmp_path}/elsewhere.py:score") == pytest.approx([2.2, 2.1])


@pytest.mark.parametrize("name", ["random", "socket", "json"])
def test_a_file_may_be_called_like_a_library(written, name):
    """Also like one that the process of the function needs itself."""
    assert written(LENGTHS, f"{name}.py:score") == pytest.approx([2.2, 2.1])
    assert sys.modules["random"] is random


def test_what_the_function_gets(written):
    source = """
import json, pathlib
def score(trainer_state, log_extra, log_metric, **columns):
    assert callable(log_extra) and callable(log_metric)
    pathlib.Path("seen.json").write_text(json.dumps([columns, trainer_state.global_step]))
    return [0.0] * len(columns["prompts"])
"""
    written(source)
    assert json.loads(Path("seen.json").read_text()) == [
        {
            "prompts": ["prompt 3", "prompt 4"],
            "completions": ["46", "oh"],
            "completion_ids": [[5], [5]],
            "answer": ["46", "7"],
            "level": [1, 2],
            "source": [None, "book"],
        },
        0,
    ]


def test_none_leaves_a_sample_out(written):
    first, second = written("def score(prompts, completions, **columns): return [None, 2]")
    assert first is None
    assert second == 2.0
    assert isinstance(second, float)
    ((unjudged,), (judged,)) = function("my_reward.py:score").load(make.fail)(PROMPTS, COMPLETIONS)
    assert unjudged == Score(None, note="the reward function returned None")
    assert judged == Score(2.0)


def test_one_call_for_the_samples_of_all_problems(tmp_path, monkeypatch):
    """The columns come once per sample, and each problem gets the scores of its own samples."""
    monkeypatch.chdir(tmp_path)
    source = """
def score(prompts, completions, answer, level, source):
    assert prompts == ["prompt 3"] * 3 + ["prompt 4"]
    assert (answer, level, source) == (["46"] * 3 + ["7"], [1, 1, 1, 2], [None, None, None, "book"])
    return [float(c) for c in completions]
"""
    Path("numbers_reward.py").write_text(source)
    completions = [[make.completion(text=text) for text in texts] for texts in ("012", "", "3")]
    prompts = [PROMPTS[0], make.prompt(9), PROMPTS[1]]
    scores = function("numbers_reward.py:score").load(make.fail)(prompts, completions)
    assert scores == [[Score(0.0), Score(1.0), Score(2.0)], [], [Score(3.0)]]


@pytest.mark.parametrize(("item", "number"), [("True", 1.0), ("-3", -3.0), ("__import__('numpy').float32(0.5)", 0.5)])
def test_numbers_of_other_kinds(written, item, number):
    assert written(f"def score(prompts, completions, **columns): return [{item}, 0]") == [number, 0.0]


@pytest.mark.parametrize(
    "returned",
    [
        "(0.25, 1)",
        "(number for number in (0.25, 1))",
        "__import__('numpy').array([0.25, 1])",
        "__import__('torch').tensor([0.25, 1])",
        "list(__import__('torch').tensor([0.25, 1]))",
    ],
)
def test_what_is_as_good_as_a_list(written, returned):
    assert written(f"def score(prompts, completions, **columns): return {returned}") == [0.25, 1.0]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ("[1.0]", "returned a list of 1; expected a list of 2 numbers"),
        ("[1.0] * 3", "returned a list of 3; expected a list of 2 numbers"),
        ("1.0", "returned float; expected a list of 2 numbers"),
        ("None", "returned NoneType; expected a list"),
        ("(1.0, 2.0, 3.0)", "returned a list of 3; expected a list of 2 numbers"),
        ("'ab'", "returned str; expected a list of 2 numbers"),
        ("{0: 1.0, 1: 2.0}", "returned dict; expected a list of 2 numbers"),
        ("['right', 'wrong']", r"returned 'right' for problem 3 \('46'\); expected a finite number"),
        ("[0.0, float('nan')]", r"returned nan for problem 4 \('oh'\); expected a finite number, or None"),
        ("[float('-inf'), 0.0]", r"returned -inf for problem 3 \('46'\)"),
        ("[0.0, 'good']", "returned 'good' for problem 4"),
        ("[0.0, [1.0]]", r"returned \[1\.0\] for problem 4"),
        ("[10 ** 400, 0.0]", "returned 1000.* for problem 3"),
    ],
)
def test_anything_but_a_list_of_numbers_is_refused(written, returned, words):
    with pytest.raises(RewardError, match=rf"the reward function my_reward\.py:score {words}") as error:
        written(f"def score(prompts, completions, **columns): return {returned}")
    assert "\n" not in str(error.value)


def test_an_exception_in_the_function(written):
    with pytest.raises(
        RewardError,
        match=r"my_reward\.py:score failed: ZeroDivisionError: division by zero \(my_reward\.py, line \d+, in score\)",
    ):
        written("def score(prompts, completions, **columns): return [1 / 0]")


@pytest.mark.parametrize(
    "made",
    [
        "def score(**columns): return helper()",
        "async def score(**columns): return helper()",
        "score = functools.partial(lambda **columns: helper())",
        "score = functools.wraps(helper)(lambda **columns: helper())",
        "class Scores:\n    def __call__(self, **columns): return helper()\nscore = Scores()",
    ],
    ids=["function", "coroutine", "partial", "wrapped", "object"],
)
def test_an_exception_is_told_with_its_line(made, written):
    with pytest.raises(RewardError, match=r"KeyError: 'x' \(my_reward\.py, line 2, in helper\)$"):
        written(f"import functools\ndef helper(): return {{}}['x']\n{made}\n")


def test_a_function_that_needs_what_there_is_not(written):
    words = (
        "it needs solution, and there are level, source, answer, prompts, completions, completion_ids, trainer_state"
    )
    with pytest.raises(RewardError, match=f"my_reward.py:score failed: TypeError: {words}"):
        written("def score(completions, solution, **columns): return [0.0, 0.0]")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere.py:score", r"there is no file nowhere\.py \(in .*\)"),
        ("no_such_module_here:score", "no_such_module_here cannot be imported: ModuleNotFoundError"),
        ("my_reward.py", r"names no function; write file\.py:function"),
        ("my_reward.py:", r"names no function; write file\.py:function"),
        (":score", r"names no function; write file\.py:function"),
    ],
)
def test_a_path_without_a_function(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match=words):
        function(path).load(make.fail)


def test_a_function_that_does_not_exist(written):
    source = "def score(prompts, completions, **columns): return []\ndef _hidden(): ...\nweight = 3"
    with pytest.raises(RewardError, match=r"no function 'scoer'; did you mean 'score'\? Choices: score$"):
        written(source, "my_reward.py:scoer")
    with pytest.raises(RewardError, match="no function 'weight'"):
        written(source, "my_reward.py:weight")


def test_a_file_that_cannot_be_imported(written):
    with pytest.raises(RewardError, match=r"my_reward\.py cannot be imported: SyntaxError"):
        written("def score(:")
    with pytest.raises(RewardError, match=r"my_reward\.py cannot be imported: KeyError: 'x'"):
        written("{}['x']")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("timeout", 0.0),
        ("timeout", float("inf")),
        ("max_failures", 0),
        ("workers", 0),
        ("memory_gib", 0.0),
        ("memory_gib", float("inf")),
        ("default", float("nan")),
        ("default", float("-inf")),
    ],
)
def test_options_out_of_range(field, value):
    with pytest.raises(ConfigError, match=rf"reward\.{field}={value} breaks the rule .*{field}"):
        function("my_reward.py:score", **{field: value})
