"""Reward functions with TRL's signatures run unchanged: by keyword, for plain prompts and for conversations."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import pytest
from functions import function, values
from helpers import composed
from omegaconf import OmegaConf

from dppo_cli.config.build import build
from dppo_cli.errors import ConfigError, RewardError
from dppo_cli.reward.function import Function
from dppo_cli.types import Completion, Prompt, Score

SYSTEM = {"role": "system", "content": "Be brief."}
COMPLETIONS = [[make.completion((5, 6, 7), text="46"), make.completion(text="7")], [make.completion(text="oh")]]


def prompt(index: int, chat: bool, answer: str, **columns: Any) -> Prompt:
    made = make.prompt(index, answer=answer, **columns)
    return replace(made, messages=(SYSTEM, {"role": "user", "content": f"prompt {index}"})) if chat else made


def prompts(chat: bool = False) -> list[Prompt]:
    return [prompt(3, chat, "46", solution="forty-six"), prompt(4, chat, "7", solution="seven")]


@pytest.fixture
def scored(tmp_path, monkeypatch):
    """Writes a module, and gives the scores by one of its functions."""
    monkeypatch.chdir(tmp_path)

    def score(
        source: str,
        path: str | list[str] = "theirs.py:score",
        chat: bool = False,
        of: list[Prompt] | None = None,
        completions: list[list[Completion]] = COMPLETIONS,
        **options: Any,
    ) -> list[list[Score]]:
        Path("theirs.py").write_text(source)
        return function(path, **options).load(make.fail)(of or prompts(chat), completions)

    return score


def seen(scored, signature: str, chat: bool = False, of: list[Prompt] | None = None) -> Any:
    """What a function with this signature gets."""
    source = f"""
import json, pathlib
def score({signature}):
    pathlib.Path("seen.json").write_text(json.dumps(locals(), default=lambda value: type(value).__name__))
    return [0.0] * 3
"""
    scored(source, chat=chat, of=of)
    return json.loads(Path("seen.json").read_text())


# What is passed


def test_a_plain_prompt_is_text_and_a_conversation_is_messages(scored):
    plain = seen(scored, "prompts, completions, completion_ids")
    assert plain == {
        "prompts": ["prompt 3", "prompt 3", "prompt 4"],
        "completions": ["46", "7", "oh"],
        "completion_ids": [[5, 6, 7], [5], [5]],
    }
    chat = seen(scored, "prompts, completions", chat=True)
    assert chat["prompts"] == [[SYSTEM, {"role": "user", "content": f"prompt {i}"}] for i in (3, 3, 4)]
    assert chat["completions"] == [[{"role": "assistant", "content": text}] for text in ("46", "7", "oh")]


def test_a_function_without_keywords_gets_what_it_names(scored):
    assert seen(scored, "completions") == {"completions": ["46", "7", "oh"]}
    assert seen(scored, "completions, solution, *, answer") == {
        "completions": ["46", "7", "oh"],
        "solution": ["forty-six", "forty-six", "seven"],
        "answer": ["46", "46", "7"],
    }
    assert seen(scored, "completions, log_extra=None, other=5") == {
        "completions": ["46", "7", "oh"],
        "log_extra": "method",
        "other": 5,
    }


def test_a_column_called_answer_is_the_answer(scored):
    of = [prompt(3, False, "46", answer_column="x"), prompt(4, False, "7")]
    of = [replace(p, example=replace(p.example, columns={"answer": "own", "answers": [1]})) for p in of]
    assert seen(scored, "completions, answer, **rest", of=of)["answer"] == ["own"] * 3


def test_no_column_takes_the_place_of_what_is_passed(scored):
    taken = dict.fromkeys(("prompts", "completions", "completion_ids", "trainer_state", "log_metric"), "theirs")
    of = [replace(p, example=replace(p.example, columns=taken)) for p in prompts()]
    found = seen(scored, "completions, prompts, completion_ids, trainer_state, log_metric", of=of)
    assert "theirs" not in str(found)


@pytest.mark.parametrize("signature", ["questions, responses, **rest", "q, completions", "prompts, texts", "*both"])
def test_a_function_with_names_of_its_own_gets_prompts_and_completions_by_position(scored, signature):
    found = list(seen(scored, signature).values())
    first, second = found[0] if signature == "*both" else found[:2]
    assert (first, second) == (["prompt 3", "prompt 3", "prompt 4"], ["46", "7", "oh"])
    if "rest" in signature:
        assert sorted(found[2]) == ["answer", "completion_ids", "log_extra", "log_metric", "solution", "trainer_state"]


def test_names_without_a_meaning_are_no_positions(scored):
    with pytest.raises(RewardError, match="it needs question, and there are solution, answer, prompts"):
        scored("def score(question, answer): return []")
    with pytest.raises(RewardError, match="it needs texts, and there are"):
        scored("def score(completions, texts): return []")


def test_the_step_is_the_number_of_rollouts_trained_on(scored):
    late = [[replace(c, versions=(8, 9)) for c in group] for group in COMPLETIONS]
    source = "def score(completions, trainer_state, **rest): return [trainer_state.global_step] * len(completions)"
    assert values(scored(source, completions=late)) == [[9.0, 9.0], [9.0]]


def test_an_object_that_can_be_called(scored):
    source = """
class Long:
    def __init__(self, limit): self.limit = limit
    def __call__(self, completion_ids, **rest): return [float(len(ids) > self.limit) for ids in completion_ids]
score = Long(2)
"""
    assert values(scored(source)) == [[1.0, 0.0], [0.0]]


def test_an_async_function_keeps_its_event_loop(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = """
import asyncio
loops = set()
async def score(completions, **rest):
    await asyncio.sleep(0.001)
    loops.add(id(asyncio.get_running_loop()))
    return [len(loops) if text != "oh" else None for text in completions]
"""
    Path("theirs.py").write_text(source)
    scorer = function("theirs.py:score").load(make.fail)
    for _ in range(2):
        assert values(scorer(prompts(), COMPLETIONS)) == [[1.0, 1.0], [None]]


def test_what_a_function_logs(scored):
    source = """
def score(completions, log_extra, log_metric, **rest):
    log_extra("parsed", ["a", None, 3])
    log_extra("solution", rest["solution"])
    log_extra("answer", ["46", "7", None])
    log_metric("share", 0.25)
    log_metric("share", 0.75)
    return [1.0, None, 0.0]
"""
    (first, second), (third,) = scored(source)
    assert first == Score(1.0, parts={"share": 0.5}, note="parsed: a", answer="46")
    assert second == Score(None, parts={"share": 0.5}, note="the reward function returned None", answer="7")
    assert third == Score(0.0, parts={"share": 0.5}, note="parsed: 3")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("log_extra('x', ['a'])", r"ValueError: log_extra\('x'\) got 1 values for 3 samples"),
        ("log_metric('x', float('nan'))", r"ValueError: log_metric\('x'\) got nan, which is not a finite number"),
        ("log_metric('x', 'high')", r"ValueError: log_metric\('x'\) got 'high', which"),
    ],
)
def test_what_cannot_be_logged(scored, line, words):
    with pytest.raises(RewardError, match=words):
        scored(f"def score(completions, log_extra, log_metric, **rest):\n    {line}\n    return [0.0] * 3")


def test_a_library_of_theirs_is_imported_by_its_name(scored, tmp_path, monkeypatch):
    """As `reward.path=trl.rewards:think_format_reward` is."""
    (tmp_path / "their_library").mkdir()
    (tmp_path / "their_library/__init__.py").write_text("from .rules import thinks")
    (tmp_path / "their_library/rules.py").write_text(
        "def thinks(completions, **kwargs): return [float('46' in c[0]['content']) for c in completions]"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert values(scored("", "their_library:thinks", chat=True)) == [[1.0, 0.0], [0.0]]
    assert "their_library" not in sys.modules


# Several functions

TWO = """
def right(completions, answer, **rest): return [float(c == a) for c, a in zip(completions, answer)]
async def short(completions, **rest): return [-len(c) if c != "oh" else None for c in completions]
def never(completions, **rest): return [None] * len(completions)
"""


def test_several_functions_are_summed_with_their_weights(scored):
    paths = ["theirs.py:right", "theirs.py:short"]
    (first, second), (third,) = scored(TWO, paths, weights=[1.0, 0.5])
    assert first == Score(0.0, parts={"right": 1.0, "short": -2.0})
    assert second == Score(-0.5, parts={"right": 0.0, "short": -1.0})
    assert third == Score(0.0, {"right": 0.0, "short": None}, note="short: the reward function returned None")
    assert values(scored(TWO, paths)) == [[-1.0, -1.0], [0.0]], "weights of 1"


def test_a_sample_that_no_function_judges_is_not_judged(scored):
    (_, _), (third,) = scored(TWO, ["theirs.py:short", "theirs.py:never"])
    assert third.value is None
    assert third.parts == {"short": None, "never": None}


def test_functions_of_the_same_name_are_told_apart_by_their_files(scored):
    Path("other.py").write_text("def right(completions, **rest): return [9.0] * len(completions)")
    (first, _), _ = scored(TWO, ["theirs.py:right", "other.py:right"])
    assert first.parts == {"theirs.right": 1.0, "other.right": 9.0}


def test_a_list_of_one_function_is_a_sum_too(scored):
    (first, _), _ = scored(TWO, ["theirs.py:right"], weights=[3.0])
    assert first == Score(3.0, parts={"right": 1.0})


@pytest.mark.parametrize(
    ("path", "weights", "words"),
    [
        (["a.py:f", "b.py:g"], [1.0], r"reward\.weights has 1 numbers, and reward\.path names 2 functions; give one"),
        ("a.py:f", [1.0, 2.0], r"reward\.weights has 2 numbers, and reward\.path names 1 functions"),
        ([], None, r"reward\.path=\[\] breaks the rule path names a function"),
        ([1], None, r"reward\.path=\[1\] breaks the rule path is file\.py:function, or a list of them"),
        (3, None, r"reward\.path=3 breaks the rule path is file\.py:function"),
        (["a.py:f"], [float("inf")], r"reward\.weights=\[inf\] breaks the rule weights are finite"),
    ],
)
def test_paths_and_weights_that_cannot_be(path, weights, words):
    with pytest.raises(ConfigError, match=words):
        function(path, weights=weights)


def test_each_function_of_a_list_is_code_that_may_be_refused(tmp_path, monkeypatch):
    """Of a run that somebody else made, for one."""
    monkeypatch.chdir(tmp_path)
    Path("theirs.py").write_text(TWO)
    node = composed("train", "reward=function", "reward.path=[theirs.py:right,theirs.py:short]").reward
    seen: list[tuple[str, str]] = []
    built = build(
        Function, OmegaConf.create({k: v for k, v in node.items() if k != "_target_"}), lambda *of: seen.append(of)
    )
    assert all(any(name in value for _, value in seen) for name in ("theirs.py:right", "theirs.py:short"))
    assert built.path == [f"{tmp_path}/theirs.py:right", f"{tmp_path}/theirs.py:short"]
