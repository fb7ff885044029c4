"""Tells every listener what happens in a run, and keeps their failures away from it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from dppo_cli.types import EvalReport, Listener, RunInfo, StepReport


class Listeners:
    """A listener that passes all on. One that raises is named in a warning, once, and hears no more but the end.

    `warn`: who is told of it; the other listeners by themselves where nobody is given.
    """

    def __init__(self, listeners: Sequence[Listener], warn: Callable[[str], None] | None = None) -> None:
        self.listening = list(listeners)
        self.warn = warn or self.warned

    def started(self, run: RunInfo) -> None:
        self._tell(lambda listener: listener.started(run))

    def evaluated(self, report: EvalReport) -> None:
        self._tell(lambda listener: listener.evaluated(report))

    def stepped(self, report: StepReport) -> None:
        self._tell(lambda listener: listener.stepped(report))

    def warned(self, text: str) -> None:
        self._tell(lambda listener: listener.warned(text))

    def finished(self, summary: Mapping[str, Any] | None) -> None:
        self._tell(lambda listener: listener.finished(summary))

    def _tell(self, event: Callable[[Listener], None]) -> None:
        for listener in list(self.listening):
            try:
                event(listener)
            except Exception as error:
                # A listener may have failed in a warning of another's, and be gone already.
                if listener in self.listening:
                    self.listening.remove(listener)
                    self._drop(listener, error)

    def _drop(self, listener: Listener, error: Exception) -> None:
        # It may hold a terminal or a connection.
        with suppress(Exception):
            listener.finished(None)
        text = f"{type(listener).__name__} failed and is switched off: {type(error).__name__}: {error}"
        with suppress(OSError):
            print(f"dppo: warning: {text}", file=sys.stderr)
        self.warn(text)
