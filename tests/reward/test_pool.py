"""Samples on which a reward function hangs or kills its process: they alone get no score, and the run goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
from functions import function, scored, values

from dppo_cli.calls import pool
from dppo_cli.errors import RewardError
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Score

NUMBERS = """
import ctypes, os, signal, sys, threading, time

def score(prompts, completions, **columns):
    for text in completions:
        if text.startswith("bad"):
            {harm}
    return [-1.0 if text.startswith("bad") else float(text) for text in completions]
"""
"""The number that a response is, after `harm` for one that is bad."""
HANG = "time.sleep(600)"
DIE = "os._exit(1)"

Loaded = Callable[..., tuple[Scorer, list[str]]]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """`load("os._exit(1)")`: the scorer of a function that does this to bad responses, and its warnings."""
    monkeypatch.chdir(tmp_path)

    def loaded(harm: str, source: str = NUMBERS, **changes: Any) -> tuple[Scorer, list[str]]:
        (tmp_path / "mine.py").write_text(source.format(harm=harm))
        warnings: list[str] = []
        return function("mine.py:score", **{"timeout": 5.0, **changes}).load(warnings.append), warnings

    return loaded


@pytest.mark.parametrize(
    ("harm", "changes", "how"),
    [
        ("while True: pass", {"timeout": 0.5}, "it did not answer within 0.5 seconds"),
        (HANG, {"timeout": 0.5}, "it did not answer within 0.5 seconds"),
        (
            "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(600)",
            {"timeout": 0.5},
            "within 0.5 seco",
        ),
        ("os.kill(os.getpid(), signal.SIGSTOP)", {"timeout": 0.5}, "it did not answer within 0.5 seconds"),
        ("os._exit(3)", {}, "its process ended (exit status 3)"),
        ("sys.exit()", {}, "its process ended (exit status 0)"),
        ("raise KeyboardInterrupt", {}, "its process ended (SIGINT)"),
        ("ctypes.string_at(0)", {}, "its process ended (SIGSEGV)"),
        ("bytearray(20 * 10**9)", {"memory_gib": 1.0}, "it ran out of reward.memory_gib"),
        ("[bytearray(10**7) for _ in range(2000)]", {"memory_gib": 0.25}, "it ran out of reward.memory_gib"),
        ("os.closerange(0, 4096)", {}, "its process ended (exit status 1)"),
        ("os.closerange(0, 4096); time.sleep(600)", {"timeout": 0.5}, "it closed its connection"),
    ],
)
def test_a_sample_that_ends_the_process_has_no_score(
    load: Loaded, harm: str, changes: dict[str, Any], how: str
) -> None:
    scorer, warnings = load(harm, **changes)
    ((first, bad, third), (fourth,)) = scored(scorer, ["0", "bad", "2"], ["3"])
    assert [first, third, fourth] == [Score(0.0), Score(2.0), Score(3.0)]
    assert bad.value is None and how in bad.note
    (warning,) = warnings
    assert warning == f"the reward function mine.py:score failed on problem 0 ('bad'): {bad.note}; scored as not judged"
    assert values(scored(scorer, ["4"], ["5", "6"])) == [[4.0], [5.0, 6.0]]
    assert len(warnings) == 1


def test_several_samples_of_several_problems(load: Loaded) -> None:
    scorer, warnings = load(DIE, workers=3)
    found = scored(scorer, ["bad 1", "1"], [], ["2", "3"], ["4", "bad 2"], ["bad 3"])
    assert values(found) == [[None, 1.0], [], [2.0, 3.0], [4.0, None], [None]]
    assert [text.partition(" failed on ")[2].partition(":")[0] for text in warnings] == [
        "problem 0 ('bad 1')",
        "problem 3 ('bad 2')",
        "problem 4 ('bad 3')",
    ]


def test_the_default_takes_the_place_of_a_score(load: Loaded) -> None:
    scorer, warnings = load(DIE, default=0.5)
    ((bad, good),) = scored(scorer, ["bad", "2"])
    assert (bad, good) == (Score(0.5, note="its process ended (exit status 1)"), Score(2.0))
    assert warnings[0].endswith("; scored as 0.5")


def test_repeated_calls_get_the_same_columns(load: Loaded) -> None:
    """Also those that no problem of the group has."""
    source = """
import os
def score(prompts, completions, answer, level):
    if "bad" in completions:
        os._exit(1)
    return [float(a) if n is None else n for a, n in zip(answer, level)]
"""
    scorer, _ = load("", source)
    prompts = [make.prompt(0, answer="7"), make.prompt(1, answer="8", level=3)]
    bad, good = make.completion(text="bad"), make.completion(text="good")
    assert values(scorer(prompts, [[bad, good], [good, good]])) == [[None, 7.0], [3.0, 3.0]]


def test_an_exception_in_a_repeated_call_ends_the_run(load: Loaded) -> None:
    scorer, _ = load("os._exit(1) if len(completions) > 1 else 1 / 0")
    with pytest.raises(RewardError, match=r"mine\.py:score failed: ZeroDivisionError"):
        scored(scorer, ["bad", "1"])


# Groups that a function wants whole


def test_a_whole_group_is_never_cut_and_is_blamed_as_one(load: Loaded, tmp_path: Path) -> None:
    source = """
import json, os
def score(prompts, completions, **columns):
    with open("calls", "a") as file:
        file.write(json.dumps(prompts) + "\\n")
    if "bad" in completions:
        os._exit(1)
    return [float(len(prompts))] * len(prompts)
score.whole_groups = True
"""
    scorer, warnings = load("", source, default=-0.5)
    found = scored(scorer, ["1", "2", "3"], ["4", "bad"], [], ["5"])
    how = "its process ended (exit status 1)"
    assert found == [[Score(3.0)] * 3, [Score(-0.5, note=how)] * 2, [], [Score(1.0)]]
    assert warnings == [f"the reward function mine.py:score failed on problem 1: {how}; scored as -0.5"]
    sizes = {"prompt 0": 3, "prompt 1": 2, "prompt 3": 1}
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert sorted(map(len, calls)) == [1, 2, 3, 6]
    for prompts in calls:
        assert all(prompts.count(prompt) == sizes[prompt] for prompt in prompts)


# Failures in a row


def test_too_many_failures_in_a_row_end_the_run(load: Loaded) -> None:
    scorer, warnings = load(DIE, max_failures=3)
    words = r"failed on problem 3 \('bad'\): .*; that is reward\.max_failures=3 times in a row"
    with pytest.raises(RewardError, match=words):
        scored(scorer, ["1"], ["bad"], ["bad"], ["bad"], ["bad"])
    assert len(warnings) == 2


def test_failures_are_counted_over_calls(load: Loaded) -> None:
    scorer, _ = load(DIE, max_failures=2)
    assert values(scored(scorer, ["bad"])) == [[None]]
    with pytest.raises(RewardError, match=r"max_failures=2"):
        scored(scorer, ["bad"])


@pytest.mark.parametrize("between", ["a sample", "a group", "a call"])
def test_a_success_in_between_starts_the_count_anew(load: Loaded, between: str) -> None:
    scorer, warnings = load(DIE, max_failures=2)
    if between == "a sample":
        assert values(scored(scorer, ["bad", "1", "bad", "2", "bad"])) == [[None, 1.0, None, 2.0, None]]
    elif between == "a group":
        assert values(scored(scorer, ["bad"], ["1"], ["bad"], ["2"], ["bad"])) == [[None], [1.0], [None], [2.0], [None]]
    else:
        for _ in range(3):
            scored(scorer, ["bad"])
            scored(scorer, ["1"])
    assert len(warnings) == 3


# The processes


def test_a_state_lasts_as_long_as_nothing_fails(load: Loaded) -> None:
    source = """
import os
calls = 0
def score(prompts, completions, **columns):
    global calls
    calls += 1
    if "bad" in completions:
        os._exit(1)
    return [calls] * len(completions)
"""
    scorer, _ = load("", source)
    assert [values(scored(scorer, ["a", "b"])) for _ in range(3)] == [[[1.0, 1.0]], [[2.0, 2.0]], [[3.0, 3.0]]]
    assert values(scored(scorer, ["bad"])) == [[None]]
    assert [values(scored(scorer, ["a"])) for _ in range(2)] == [[[1.0]], [[2.0]]], "a process of its own, and new"


def test_empty_groups_are_no_call(load: Loaded) -> None:
    scorer, _ = load("", "def score(prompts, completions, **columns): assert completions; return [1.0] * len(prompts)")
    assert scored(scorer) == []
    assert scored(scorer, [], []) == [[], []]
    assert scored(scorer, [], ["a"], []) == [[], [Score(1.0)], []]


@pytest.mark.parametrize(
    ("line", "how"),
    [
        ("time.sleep(600)", "it did not answer within 0.5 seconds"),
        ("sys.exit(7)", r"its process ended \(exit status 7\)"),
        ("os._exit(0)", r"its process ended \(exit status 0\)"),
        ("os.kill(os.getpid(), 11)", r"its process ended \(SIGSEGV\)"),
    ],
)
def test_a_module_that_cannot_be_imported(load: Loaded, monkeypatch: pytest.MonkeyPatch, line: str, how: str) -> None:
    monkeypatch.setattr(pool, "LOADING", 0.5 if "sleep" in line else 60.0)
    with pytest.raises(RewardError, match=rf"^reward\.path=mine\.py:score cannot be imported: {how}$"):
        load("pass", f"import os, sys, time\n{line}\n{NUMBERS}")


def test_a_module_that_cannot_be_imported_again(load: Loaded, tmp_path: Path) -> None:
    scorer, _ = load(DIE)
    (tmp_path / "mine.py").write_text("1 / 0")
    with pytest.raises(RewardError, match=r"mine\.py cannot be imported: ZeroDivisionError"):
        scored(scorer, ["bad"])


def test_a_module_that_cannot_be_imported_is_told_of_once(load: Loaded, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RewardError, match=r"^reward\.path=mine\.py cannot be imported: ZeroDivisionError: [^\n]*$"):
        load("", "1 / 0")
    assert capfd.readouterr() == ("", "")
