"""Tools: how they are described, which calls are understood, what the model is told."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
from environments import tools

from dppo_cli.environment.tools import ToolCall, ToolEnvironment, calls_in
from dppo_cli.errors import ConfigError, ReplyError

TOOLS = '''
import functools, os, time

def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a * b


async def look_up(word: str, language: str = "en") -> dict:
    """Look a word up.

    Args:
        word: The word.
        language: Of the word.
    """
    return {"word": word, "in": language, "ß": None}


def harm(kind: str) -> str:
    """Do harm.

    Args:
        kind: Of what.
    """
    if kind == "hang":
        time.sleep(60)
    if kind == "die":
        os._exit(3)
    raise KeyError(kind)


def echo(text: str) -> str:
    """Say it again.

    Args:
        text: What.
    """
    return text


nameless = functools.partial(multiply, 2)


def undescribed(a: int):
    return a


def untyped(a):
    """Do.

    Args:
        a: What.
    """
'''
MULTIPLY = '<tool_call>\n{"name": "multiply", "arguments": {"a": 6, "b": 7}}\n</tool_call>'

Load = Callable[..., ToolEnvironment]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.py").write_text(TOOLS)

    def loaded(*names: str, **changes: Any) -> ToolEnvironment:
        return tools([f"tools.py:{name}" for name in names], **changes).load(make.fail)

    return loaded


def results(environment: ToolEnvironment, text: str) -> list[str]:
    reply = environment.begin(make.prompt(), [{"role": "assistant", "content": text}], 1)()
    assert not reply.failed and {m["role"] for m in reply.messages} <= {"tool"}
    return [message["content"] for message in reply.messages]


def test_schemas_come_from_hints_and_docstrings(load: Load) -> None:
    (multiply, look_up) = (schema["function"] for schema in load("multiply", "look_up").schemas)
    assert (multiply["name"], multiply["description"]) == ("multiply", "Multiply two numbers.")
    assert multiply["parameters"]["properties"]["b"] == {"type": "integer", "description": "The second number."}
    assert multiply["parameters"]["required"] == ["a", "b"] and look_up["parameters"]["required"] == ["word"]


def test_calls_are_made_and_answered_in_their_order(load: Load) -> None:
    environment = load("multiply", "look_up")
    look_up = '<tool_call>{"name": "look_up", "arguments": {"word": "Straße"}}</tool_call>'
    assert results(environment, f"I need two things. {MULTIPLY}{look_up}") == [
        "42",
        '{"word": "Straße", "in": "en", "ß": null}',
    ]
    assert results(environment, "It is 42.") == []
    assert (environment.role, environment.turns, environment.turn_tokens) == ("tool", 4, None)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("nothing", []),
        (MULTIPLY, [ToolCall("multiply", {"a": 6, "b": 7})]),
        ('<tool_call>{"name": "now"}</tool_call> <tool_call>{"name": "now"}', [ToolCall("now", {})] * 2),
        ('{"name": "f", "parameters": {"x": [1]}}', [ToolCall("f", {"x": [1]})]),
        (' [{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]\n', [ToolCall("f", {}), ToolCall("g", {})]),
        ('The call would be {"name": "f", "arguments": {}}', []),
        ('{"answer": 42}', []),
        ("[1, 2]", []),
        ("[]", []),
        ("{broken", []),
        ("[" * 100_000, []),
        ('{"name": "Bob"}', []),
        ('[{"name": "f", "arguments": {}}, {"name": "Bob"}]', []),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call>', [ToolCall("f", {})]),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', [ToolCall("f", {"a": 1})]),
        (
            '<tool_call>{"name": "f", "arguments": "x"}</tool_call>',
            ['Error: a call is {"name": ..., "arguments": {...}}'],
        ),
        ("<tool_call>5</tool_call>", ['Error: a call is {"name": ..., "arguments": {...}}']),
    ],
)
def test_which_calls_are_understood(text: str, calls: list[ToolCall | str]) -> None:
    assert calls_in(text) == calls


def test_a_call_that_is_not_json_is_told_to_the_model() -> None:
    (told,) = calls_in("<tool_call>{multiply}</tool_call>")
    assert isinstance(told, str) and told.startswith("Error: the call is not JSON: Expecting property name")
    (told,) = calls_in("<tool_call>" + "[" * 100_000)
    assert isinstance(told, str) and told.startswith("Error: the call is not JSON")


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ('{"name": "multiply", "arguments": {"a": 6}}', "Error: TypeError: missing a required argument: 'b'"),
        ('{"name": "multiply", "arguments": {"a": 6, "b": 7, "c": 8}}', "got an unexpected keyword argument 'c'"),
        ('{"name": "divide", "arguments": {}}', "Error: there is no tool 'divide'; there are: multiply, harm"),
        ('{"name": "harm", "arguments": {"kind": "x"}}', "Error: KeyError: 'x'"),
        ('{"name": "harm", "arguments": {"kind": "hang"}}', "Error: it did not answer within 1 seconds"),
        ('{"name": "harm", "arguments": {"kind": "die"}}', "Error: its process ended (exit status 3)"),
    ],
)
def test_what_goes_wrong_is_told_to_the_model(load: Load, call: str, told: str) -> None:
    environment = load("multiply", "harm", timeout=1.0)
    (found, other) = results(environment, f"<tool_call>{call}</tool_call>{MULTIPLY}")
    assert told in found and other == "42"


def test_long_results_are_cut(load: Load) -> None:
    assert results(load("multiply", reply_characters=1), MULTIPLY) == ["4..."]


def test_half_a_character_from_the_model_is_replaced(load: Load) -> None:
    """It is valid JSON, and no text that a tokenizer takes."""
    call = '<tool_call>{"name": "%s", "arguments": {"text": "a\\ud800b"}}</tool_call>'
    assert results(load("echo"), call % "echo") == ["a?b"]
    assert results(load("echo"), call % "say") == ["Error: there is no tool 'say'; there are: echo"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("undescribed", r"the tool undescribed cannot be described to a model: .*; give every parameter a type hint"),
        ("untyped", r"the tool untyped cannot be described to a model: .*type hint"),
        (
            "nameless",
            r"environment.path: functools.partial\(.*\) has no name; a tool is a function that `def`",
        ),
        ("divide", r"environment.path=tools.py:divide: there is no function 'divide'"),
        ("", r"environment.path: tools.py: names no function"),
    ],
)
def test_functions_that_cannot_be_tools(load: Load, name: str, text: str) -> None:
    with pytest.raises(ReplyError, match=text):
        load(name)


def test_two_tools_of_one_name(load: Load) -> None:
    with pytest.raises(ReplyError, match=r"environment.path: two tools are called multiply; a tool is a function"):
        load("multiply", "multiply")


def test_one_path_or_several() -> None:
    assert tools("a.py:f").paths == ["a.py:f"] and tools(["a.py:f", "b.py:g"]).paths == ["a.py:f", "b.py:g"]
    for wrong in ([], [5], 5):
        with pytest.raises(ConfigError, match=r"environment\.path"):
            tools(wrong)  # type: ignore[arg-type]
