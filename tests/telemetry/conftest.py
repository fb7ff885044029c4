"""What tests of the console share as fixtures."""

import io
from typing import Any

import pytest
from rich.console import Console


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Makes consoles believe they write to a terminal of 100 columns."""
    screen = io.StringIO()

    def rich(file: Any = None, **options: Any) -> Console:
        return Console(file=screen, force_terminal=True, width=100, color_system=None, **options)

    monkeypatch.setattr("dppo_cli.telemetry.console.RichConsole", rich)
    return screen
