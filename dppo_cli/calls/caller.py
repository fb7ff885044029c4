"""Calling a user's function by the names of its parameters, and saying what it raised. Imports no torch."""

import asyncio
import inspect
import os
import traceback
from pathlib import Path
from typing import Any

PLACED = ("prompts", "completions")
LONGEST = 1000
"""Characters of what an exception says."""
HERE = os.path.dirname(__file__)


class Caller:
    """Its event loop lives as long as the process, so that an async function may keep a client."""

    def __init__(self) -> None:
        self.loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, function: Any, keywords: dict[str, Any]) -> Any:
        """What the function returns. Raises what it raises, and TypeError if it needs what there is not."""
        positional, named = arguments(function, keywords)
        found = function(*positional, **named)
        if inspect.isawaitable(found):
            self.loop = self.loop or asyncio.new_event_loop()
            found = self.loop.run_until_complete(_awaited(found))
        return found


def arguments(function: Any, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """Positional and keyword arguments: everything by keyword, as far as the function takes it.

    A function whose first two parameters have names of their own, such as `f(questions, responses, **columns)`, gets
    prompts and completions by position. Raises TypeError if it needs what there is not.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # Written in C.
        return [], given
    kinds = inspect.Parameter
    takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
    takes = {p.name for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)}
    positional = [given[name] for name in PLACED] if _takes_by_position(parameters, given) else []
    rest = {name: value for name, value in given.items() if not (positional and name in PLACED)}
    named = {name: value for name, value in rest.items() if takes_all or name in takes}
    needed = [p.name for p in parameters[len(positional) :] if p.default is kinds.empty and p.name in takes]
    if lacking := [name for name in needed if name not in named]:
        raise TypeError(f"it needs {', '.join(lacking)}, and there are {', '.join(given)}")
    return positional, named


def _takes_by_position(parameters: list[inspect.Parameter], given: dict[str, Any]) -> bool:
    """Whether the first two parameters are for prompts and completions, but have other names, or no name to use."""
    kinds = inspect.Parameter
    if not all(name in given for name in PLACED) or not parameters:
        return False
    if parameters[0].kind is kinds.VAR_POSITIONAL:
        return all(p.kind is not kinds.VAR_KEYWORD for p in parameters)
    first = parameters[:2]
    own = [
        p.kind is kinds.POSITIONAL_ONLY or (p.kind is kinds.POSITIONAL_OR_KEYWORD and p.name not in given)
        for p in first
    ]
    ours = [p.name == name for p, name in zip(first, PLACED, strict=False)]
    needed = all(p.default is kinds.empty for p in first)
    return len(first) == 2 and needed and any(own) and all(a or b for a, b in zip(own, ours, strict=True))


async def _awaited(awaitable: Any) -> Any:
    return await awaitable


def told(error: Exception) -> str:
    """An exception in a line, with where the user's file last was: `KeyError: 'x' (mine.py, line 3, in score)`."""
    between = ("<frozen ", os.path.dirname(asyncio.__file__), HERE)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(between)]
    own = [frame for frame in frames if frame.filename == frames[0].filename]
    at = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name})" if own else ""
    return f"{type(error).__name__}: {text_of(error)}{at}"


def text_of(error: Exception) -> str:
    """What it says. Not every exception can."""
    try:
        text = str(error)
    except Exception:
        return "it cannot say what"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def described(value: Any) -> str:
    """A value that a function returned, in some words."""
    try:
        return repr(value)[:200]
    except Exception:
        return f"a {type(value).__name__}"
