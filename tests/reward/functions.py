"""What tests of the user's reward function share: its options, and which processes there are."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make

from dppo_cli.reward.function import Function
from dppo_cli.reward.scorer import Scorer
from dppo_cli.types import Score


def function(path: str | list[str], **changes: Any) -> Function:
    """With the defaults of conf/reward/function.yaml."""
    fields = {"weights": None, "timeout": 60.0, "default": None, "max_failures": 10, "workers": 2, "memory_gib": 8.0}
    return Function(path, **{**fields, **changes})


def scored(scorer: Scorer, *texts: Sequence[str]) -> list[list[Score]]:
    """The scores of responses to problem 0, to problem 1, and so on."""
    prompts = [make.prompt(i) for i in range(len(texts))]
    return scorer(prompts, [[make.completion(text=text) for text in group] for group in texts])


def values(scores: Sequence[Sequence[Score]]) -> list[list[float | None]]:
    return [[score.value for score in group] for group in scores]


def workers_of(parent: int) -> list[int]:
    """The worker processes that a process has."""
    return [pid for pid in processes() if parent_of(pid) == parent and b"dppo_cli.calls.worker" in command_of(pid)]


def processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def alive(pid: int) -> bool:
    """Whether it runs. One that has ended and that nobody has waited for does not."""
    return bool(command_of(pid))


def parent_of(pid: int) -> int | None:
    try:
        # What follows the name, which may hold anything: its state, and its parent.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
