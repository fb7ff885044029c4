"""What a function that answers a conversation gives in a worker, as JSON. Imports no torch."""

from collections.abc import Mapping
from typing import Any

from dppo_cli.calls.caller import Caller, described, told


def shortened(text: str, most: int) -> str:
    """At most so many characters, and three dots where some are left out at the end; only what UTF-8 can hold.

    Example:
        >>> shortened("a long reply", 6)
        'a long...'
    """
    cut = text if len(text) <= most else f"{text[:most]}..."
    return cut.encode("utf-8", "replace").decode("utf-8")


class Replies:
    """Answers with what is to be said next. `function`: what `find_function` has found."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.caller = Caller()
        self.about: dict[str, Any] = {}

    def __call__(self, keywords: dict[str, Any], number: int) -> dict[str, Any]:
        """The `reply`, a list of texts and of messages with a `role` and a `content`, empty where the conversation is
        over; or what was `returned` instead; or what was `raised`. Raises MemoryError.

        `number`: most characters of a text.
        """
        try:
            found = self.caller(self.function, keywords)
        except MemoryError:
            raise
        except Exception as error:
            return {"raised": told(error)}
        parts = [] if found is None else list(found) if isinstance(found, list | tuple) else [found]
        if not all(isinstance(part, str) or _is_message(part) for part in parts):
            return {"returned": described(found)}
        return {
            "reply": [
                shortened(part, number)
                if isinstance(part, str)
                else {"role": part["role"], "content": shortened(part["content"], number)}
                for part in parts
            ]
        }


def _is_message(part: Any) -> bool:
    return (
        isinstance(part, Mapping)
        and set(part) == {"role", "content"}
        and all(isinstance(value, str) for value in part.values())
    )
