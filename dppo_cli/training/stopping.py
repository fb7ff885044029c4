"""Signals that stop a run.

SIGINT (Ctrl-C), SIGTERM and SIGHUP let the step in progress finish, for `grace` seconds at most. A second one stops it
at once, a third kills the process. SIGUSR1 asks for a checkpoint. Python hears signals in the main thread only; in
another thread this does nothing.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from dppo_cli.errors import Stopped

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Stopping:
    """`with Stopping(grace, say) as stopping:` hears signals; `stopping.check()` stops a run that was asked to stop."""

    def __init__(self, grace: float, say: Callable[[str], None]) -> None:
        self.grace, self.say = grace, say
        self.signum: int | None = None
        self.at_once = False
        self.wants_checkpoint = False
        self.shields = 0
        self.unsaid: str | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Stopping":
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = dict.fromkeys(STOPPING, self._stop)
            if hasattr(signal, "SIGUSR1"):
                handlers |= {signal.SIGUSR1: self._save, signal.SIGALRM: self._out_of_time}
            for signum, handler in handlers.items():
                # nohup has the process ignore SIGHUP, a shell has what runs in the background ignore SIGINT.
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self.before[signum] = signal.signal(signum, handler)
        return self

    def __exit__(self, *_: object) -> None:
        if self.before and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def check(self) -> None:
        """Raise Stopped if a signal has asked for it."""
        if self.signum is not None:
            raise Stopped(self.signum)

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Nothing within is interrupted; a stop that came in the meantime is said and raised at the end."""
        self.shields += 1
        try:
            yield
        finally:
            self.shields -= 1
        if self.unsaid and not self.shields:
            self.say(self.unsaid)
            self.unsaid = None
        if self.at_once and not self.shields:
            self.check()

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum
            name = signal.Signals(signum).name
            text = f"{name}: stopping after this step, within {self.grace:g} seconds; once more to stop at once"
            if self.shields:  # A line may be half printed, and would be printed twice.
                self.unsaid = text
            else:
                self.say(text)
            if hasattr(signal, "setitimer"):
                signal.setitimer(signal.ITIMER_REAL, max(self.grace, 1e-3))
            return
        for again in self.before.keys() & set(STOPPING):
            signal.signal(again, signal.SIG_DFL)
        self._out_of_time(signum, frame)

    def _out_of_time(self, signum: int, frame: FrameType | None) -> None:
        self.at_once = True
        if not self.shields:
            self.check()

    def _save(self, signum: int, frame: FrameType | None) -> None:
        self.wants_checkpoint = True
