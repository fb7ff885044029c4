"""Tools of the user in a worker: what they are, and what calls of them give, as JSON. Imports no torch."""

import inspect
import json
from typing import Any

from dppo_cli.calls.caller import Caller, described, text_of
from dppo_cli.calls.replies import shortened
from dppo_cli.errors import ReplyError


class Tools:
    """Answers with what the tool says. `functions`: what `find_function` has found, one for each tool.

    `about`: their JSON schemas, from type hints and docstrings, as chat templates take them (transformers'
    `get_json_schema`).
    """

    def __init__(self, functions: list[Any]) -> None:
        self.functions: dict[str, Any] = {}
        for function in functions:
            name = getattr(function, "__name__", None)
            if name is None or name in self.functions:
                what = f"two tools are called {name}" if name else f"{described(function)} has no name"
                raise ReplyError(f"environment.path: {what}; a tool is a function that `def` has made, under its name")
            self.functions[name] = function
        self.caller = Caller()
        self.about = {"schemas": [_schema(function) for function in functions]}

    def __call__(self, keywords: dict[str, Any], number: int) -> dict[str, Any]:
        """A call by `name` with `arguments`. An error is a text, too, for the model to read. Raises MemoryError.

        `number`: most characters of a result.
        """
        return {"reply": shortened(self._result(keywords["name"], keywords["arguments"]), number)}

    def _result(self, name: str, arguments: dict[str, Any]) -> str:
        function = self.functions.get(name)
        if function is None:
            return f"Error: there is no tool {name!r}; there are: {', '.join(self.functions)}"
        try:
            inspect.signature(function).bind(**arguments)
            found = self.caller(function, arguments)
            return found if isinstance(found, str) else json.dumps(found, ensure_ascii=False, default=str)
        except MemoryError:
            raise
        except Exception as error:
            # Without a file's name, which a model has no use for.
            return f"Error: {type(error).__name__}: {text_of(error)}"


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
