"""What a function that answers a conversation gives in a worker, as JSON. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from dppo_cli.calls.caller import Caller, told


class Replies:
    """Answers with what is to be said next. `function`: what `find_function` has found."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.caller = Caller()
        self.about: dict[str, Any] = {}

    def __call__(self, keywords: dict[str, Any], step: int) -> dict[str, Any]:
        """The `reply`, a list of texts and of messages with a `role` and a `content`, or None where the conversation is
        over; or what was `returned` instead; or what was `raised`. Raises MemoryError.
        """
        try:
            found = self.caller(self.function, keywords)
        except MemoryError:
            raise
        except Exception as error:
            return {"raised": told(error)}
        if found is None:
            return {"reply": None}
        parts = list(found) if isinstance(found, list | tuple) else [found]
        if not parts or not all(isinstance(part, str) or _is_message(part) for part in parts):
            return {"returned": repr(found)[:200]}
        return {"reply": [part if isinstance(part, str) else dict(part) for part in parts]}


def _is_message(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and set(part) == {"role", "content"}
        and all(isinstance(value, str) for value in part.values())
    )
