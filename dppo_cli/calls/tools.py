"""Tools of the user in a worker: what they are, and what calls of them give, as JSON. Imports no torch."""

import inspect
import json
from typing import Any

from dppo_cli.calls.caller import Caller, told
from dppo_cli.errors import ReplyError


class Tools:
    """Answers with what the tool says. `functions`: what `find_function` has found, one for each tool.

    `about`: their JSON schemas, from type hints and docstrings, as chat templates take them (transformers'
    `get_json_schema`).
    """

    def __init__(self, functions: list[Any]) -> None:
        self.functions = {function.__name__: function for function in functions}
        self.caller = Caller()
        self.about = {"schemas": [_schema(function) for function in functions]}

    def __call__(self, keywords: dict[str, Any], step: int) -> dict[str, Any]:
        """A call by `name` with `arguments`. An error is a text, too, for the model to read. Raises MemoryError."""
        function = self.functions.get(keywords["name"])
        if function is None:
            return {"reply": f"Error: there is no tool {keywords['name']!r}; there are: {', '.join(self.functions)}"}
        try:
            inspect.signature(function).bind(**keywords["arguments"])
            found = self.caller(function, keywords["arguments"])
            return {"reply": found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)}
        except MemoryError:
            raise
        except Exception as error:
            # In the words that a model knows, without a file's name, which it has no use for.
            return {"reply": f"Error: {type(error).__name__}: {error}", "failed": told(error)}


def _schema(function: Any) -> dict[str, Any]:
    from transformers.utils.chat_template_utils import get_json_schema

    try:
        found: dict[str, Any] = get_json_schema(function)
        return found
    except Exception as error:
        name = getattr(function, "__name__", repr(function))
        raise ReplyError(
            f"the tool {name} cannot be described to a model: {' '.join(str(error).split())}; give every parameter a "
            "type hint, and the function a docstring with a line for each under `Args:`"
        ) from None
