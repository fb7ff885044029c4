"""Says what a command does while that takes long: a spinner in a terminal, a line at begin and end elsewhere."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from threading import Timer

from rich.markup import escape

from dppo_cli.telemetry.table import RichConsole

LONG = 5.0
"""Seconds after which a phase is said. Shorter ones would only be lines to read."""


@contextmanager
def phase(name: str, console: RichConsole | None = None, spinner: bool = True) -> Iterator[None]:
    """Around a long phase. `console`: stderr where none is given, because stdout may be for other programs."""
    shown = console or RichConsole(stderr=True, highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        # Nothing that is only shown may end a run.
        with suppress(OSError, ValueError):
            shown.print(text, markup=False)

    began = time.monotonic()
    spins = spinner and shown.is_terminal
    timer = Timer(LONG, say, [f"{name} ..."])
    timer.daemon = True
    if not spins:
        timer.start()
    try:
        with shown.status(escape(name)) if spins else nullcontext():
            yield
    finally:
        timer.cancel()
    if (seconds := time.monotonic() - began) >= LONG:
        say(f"{name}: {seconds:.0f} s")
