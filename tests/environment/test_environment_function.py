"""The user's own function as an environment: what it gets, what it may return, and what becomes of its failures."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
from environments import function

from dppo_cli.calls.replies import shortened
from dppo_cli.environment.environment import NoEnvironment, Reply
from dppo_cli.environment.function import FunctionEnvironment
from dppo_cli.errors import ConfigError, ReplyError
from dppo_cli.types import Example, Prompt

SAID = ({"role": "assistant", "content": "41"},)

Load = Callable[..., FunctionEnvironment]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """`load("'no'")`: the environment whose function returns this, or does it where it is a statement."""
    monkeypatch.chdir(tmp_path)

    def loaded(body: str, warn: Callable[[str], None] = make.fail, **changes: Any) -> FunctionEnvironment:
        does = body if body.startswith(("return", "raise", "import", "while", "if")) else f"return {body}"
        (tmp_path / "env.py").write_text(f"def reply(messages, answer, turn, **columns):\n    {does}\n")
        return function("env.py:reply", **changes).load(warn)

    return loaded


def reply(environment: FunctionEnvironment, said: Any = SAID, turn: int = 1, **columns: Any) -> Reply:
    return environment.begin(make.prompt(7, answer="42", **columns), said, turn)()


def test_without_one_a_response_is_one_turn() -> None:
    assert NoEnvironment().load(make.fail) is None


def test_what_the_function_gets(load: Load) -> None:
    environment = load("repr([messages, answer, turn, columns])")
    (found,) = reply(environment, turn=3, level=2, messages="a column of that name").messages
    conversation = [{"role": "user", "content": "prompt 7"}, {"role": "assistant", "content": "41"}]
    assert found == {"role": "user", "content": repr([conversation, "42", 3, {"level": 2}])}
    assert (environment.turns, environment.turn_tokens, environment.stop, environment.schemas) == (4, None, [], ())


def test_an_answer_of_the_data_goes_before_the_problems(load: Load) -> None:
    prompt = Prompt(0, Example("1+1=", "2", {"answer": ["a", "b"]}), (3,))
    assert load("str(answer)").begin(prompt, SAID, 1)().messages == [{"role": "user", "content": "['a', 'b']"}]


@pytest.mark.parametrize(
    ("returned", "messages"),
    [
        ("None", []),
        ("'no'", [("user", "no")]),
        ("{'role': 'tool', 'content': 'x'}", [("tool", "x")]),
        ("['a', {'role': 'system', 'content': 'b'}]", [("user", "a"), ("system", "b")]),
        ("('a',)", [("user", "a")]),
        ("[]", []),
        ("'a\\ud800b'", [("user", "a?b")]),
        ("{'role': 'tool', 'content': 'a\\udc00'}", [("tool", "a?")]),
    ],
)
def test_what_the_function_may_return(load: Load, returned: str, messages: list[tuple[str, str]]) -> None:
    assert [(m["role"], m["content"]) for m in reply(load(returned)).messages] == messages


@pytest.mark.parametrize("returned", ["5", "[1]", "{'role': 'user'}", "{'role': 'user', 'content': 1}", "b'x'"])
def test_what_it_may_not_return(load: Load, returned: str) -> None:
    with pytest.raises(ReplyError, match=r"env.py:reply returned .* for problem 7; expected a text, a message with"):
        reply(load(returned))


@pytest.mark.parametrize(
    ("changes", "role", "allowed"),
    [
        ({}, "assistant", "user, tool, system"),
        ({}, "boss", "user"),
        ({"role": "assistant", "stop": ["="]}, "user", "ass"),
    ],
)
def test_roles_that_cannot_speak(load: Load, changes: dict[str, Any], role: str, allowed: str) -> None:
    environment = load(f"{{'role': '{role}', 'content': 'x'}}", **changes)
    with pytest.raises(ReplyError, match=rf"a message of the role '{role}' for problem 7; with .* it may be {allowed}"):
        reply(environment)


def test_an_async_function(load: Load, tmp_path: Path) -> None:
    (tmp_path / "later.py").write_text("async def reply(messages):\n    return 'later'\n")
    environment = function("later.py:reply").load(make.fail)
    assert reply(environment).messages == [{"role": "user", "content": "later"}]


def test_a_long_reply_is_cut(load: Load) -> None:
    assert reply(load("'abcdefgh'", reply_characters=5)).messages[0]["content"] == "abcde..."
    assert shortened("abcde", 5) == "abcde"


def test_a_function_that_raises_ends_the_run(load: Load) -> None:
    with pytest.raises(ReplyError, match=r"failed on problem 7: ValueError: no \(env.py, line 2, in reply\)"):
        reply(load("raise ValueError('no')"))
    with pytest.raises(ReplyError, match=r"ValueError: x{1000}\.\.\. \(env.py, line 2, in reply\)"):
        reply(load("raise ValueError(5000 * 'x')"))
    silent = "type('Silent', (Exception,), {'__str__': lambda self: 1 / 0, '__repr__': lambda self: 1 / 0})()"
    with pytest.raises(ReplyError, match=r"Silent: it cannot say what \(env.py, line 2, in reply\)"):
        reply(load(f"raise {silent}"))
    with pytest.raises(ReplyError, match="returned a Silent for problem 7"):
        reply(load(silent))


@pytest.mark.parametrize(
    ("harm", "how"), [("sum(iter(int, 1))", "did not answer within 3 seconds"), ("import os; os._exit(3)", "status 3")]
)
def test_a_call_that_hangs_or_dies_ends_its_response_alone(load: Load, harm: str, how: str) -> None:
    told: list[str] = []
    environment = load(f"if turn == 1: {harm}\n    return 'go on'", told.append, timeout=3.0)
    broken = environment.begin(make.prompt(7), SAID, 1)
    other = environment.begin(make.prompt(8), SAID, 2)
    found = broken()
    assert found.messages == () and how in found.failed
    assert other().messages == [{"role": "user", "content": "go on"}]
    (line,) = told
    assert "the environment env.py:reply failed on problem 7:" in line and how in line
    assert line.endswith("; the response ends there, and is not trained on")


def test_a_worker_that_still_imports_is_killed_with_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread would be waited for at the end of the process."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text(
        "import os, time\nif os.path.exists('once'):\n    open('twice', 'w').close()\n    time.sleep(100)\n"
        "open('once', 'w').close()\ndef reply(messages):\n    time.sleep(100)\n"
    )
    environment = function("slow.py:reply").load(make.fail)
    for _ in range(2):
        environment.begin(make.prompt(), SAID, 1)
    end = time.monotonic() + 30
    while not (tmp_path / "twice").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert (tmp_path / "twice").exists()
    start = time.monotonic()
    environment.give_up()
    environment.pool.threads.shutdown(wait=True)
    assert time.monotonic() - start < 20


def test_failures_in_a_row_end_the_run(load: Load) -> None:
    told: list[str] = []
    environment = load("if turn == 1: import os; os._exit(3)\n    return 'go on'", told.append, max_failures=2)
    for turn in (1, 2, 1):
        reply(environment, turn=turn)
    assert len(told) == 2
    with pytest.raises(ReplyError, match=r"that is environment.max_failures=2 times in a row"):
        reply(environment, turn=1)


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("env.py", "environment.path=env.py names no function; write file.py:function"),
        ("nowhere.py:reply", r"environment.path: there is no file nowhere.py"),
        ("env.py:replyy", r"environment.path=env.py:replyy: there is no function 'replyy'; did you mean 'reply'"),
        ("bad.py:reply", r"environment.path=bad.py cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_function_that_cannot_be_had(load: Load, tmp_path: Path, path: str, text: str) -> None:
    load("None")
    (tmp_path / "bad.py").write_text("1 / 0")
    with pytest.raises(ReplyError, match=text):
        function(path).load(make.fail)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"role": "boss"}, "environment.role=boss"),
        ({"role": "assistant"}, r"environment.role=assistant .* add environment.stop=\[\"=\"\]"),
        ({"stop": [""]}, "stop has no empty text"),
        ({"turns": 1}, "turns >= 2"),
        ({"turn_tokens": 0}, "turn_tokens >= 1 or null"),
        ({"reply_characters": 0}, "reply_characters >= 1"),
        ({"timeout": 0.0}, "0 < timeout"),
        ({"max_failures": 0}, "max_failures >= 1"),
        ({"workers": 0}, "workers >= 1"),
        ({"memory_gib": 0.0}, "memory_gib > 0"),
    ],
)
def test_options_that_cannot_work(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        function("env.py:reply", **changes)
