"""What the tests of environments share: options with the defaults of conf/environment."""

from typing import Any

from dppo_cli.environment.function import Function
from dppo_cli.environment.tools import Tools

SHARED = {"turns": 4, "turn_tokens": None, "reply_characters": 4000, "timeout": 60.0, "workers": 2, "memory_gib": 8.0}


def function(path: str, **changes: Any) -> Function:
    return Function(path, **{"role": "user", "stop": [], "max_failures": 10, **SHARED, **changes})


def tools(path: str | list[str], **changes: Any) -> Tools:
    return Tools(path, **{**SHARED, **changes})
