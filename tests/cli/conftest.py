"""What holds for every mistake of a user: one clear line, and nothing on the disk."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dppo_cli.cli.main import main


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], work: Path) -> Callable[..., str]:
    """`refused("train", "steps=0")`: runs it, checks what holds for every mistake, returns the line shown."""

    def run(*words: str) -> str:
        before = sorted(work.rglob("*"))
        status = main(list(words))
        captured = capsys.readouterr()
        assert status == 2
        assert captured.err.count("\n") == 1 and captured.err.startswith("dppo: ")
        assert "Traceback" not in captured.out
        left = [p for p in sorted(work.rglob("*")) if p not in before and "__pycache__" not in p.parts]
        assert left in ([], [work / "runs"])  # An empty runs/ may stay.
        return captured.err.removeprefix("dppo: ").strip()

    return run
