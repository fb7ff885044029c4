"""One process at a time has a run folder open, and no process takes the folder of another."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers import read_lines

from dppo_cli.errors import RunError
from dppo_cli.training.lock import hold, is_held
from dppo_cli.training.run_folder import RunFolder

HOLD = """\
import sys
from pathlib import Path
from dppo_cli.training.run_folder import RunFolder

with RunFolder(Path("run"), "steps: 1\\n", 0, goes_on=Path("run").exists()) as run:
    run.log({"step": 1})
    print("open", flush=True)
    sys.stdin.read()
"""
"""Opens the folder `run`, finishes a step, and waits until its input ends."""


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@contextmanager
def another_process() -> Iterator[subprocess.Popen[str]]:
    """One that has the folder open."""
    pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", HOLD], **pipes) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "open\n"
            yield process
        finally:
            process.kill()


def files() -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(Path("run").rglob("*")) if path.is_file()}


def in_use() -> Any:
    return pytest.raises(RunError, match=r"^run_dir=run is in use by another process; wait for it, or choose another")


def test_a_pipe_in_its_place_is_not_waited_for() -> None:
    Path("run").mkdir()
    os.mkfifo("run/.lock")
    assert not is_held(Path("run"))
    with pytest.raises(RunError, match=r"run/\.lock is not a file; delete it"):
        hold(Path("run"))


def test_a_folder_that_another_process_has_open_is_refused() -> None:
    with another_process():
        before = files()
        for _ in range(2):
            with in_use(), RunFolder(Path("run"), "steps: 9\n", 0, goes_on=True):
                pytest.fail("it was opened")
        assert files() == before, "the refused one has changed nothing"


def test_two_that_start_at_once() -> None:
    """Both have found the folder free; the second to open it is refused, and its clean-up spares the first."""
    late = RunFolder(Path("run"), "steps: 9\n", 0)
    with another_process():
        before = files()
        with in_use(), late:
            pytest.fail("it was opened")
        assert files() == before


def test_one_that_comes_after_the_other_has_ended() -> None:
    """It had found the folder free, and now there is a run in it."""
    late = RunFolder(Path("run"), "steps: 9\n", 0)
    with another_process() as process:
        process.communicate("")
    before = files()
    with pytest.raises(RunError, match=r"run_dir=run already holds a run"), late:
        pytest.fail("it was opened")
    assert files() == before


def test_the_folder_is_free_after_the_other_was_killed() -> None:
    with another_process() as process:
        process.kill()
        process.wait()
        with RunFolder(Path("run"), "steps: 9\n", 0, goes_on=True) as run:
            run.cut(1)
            run.log({"step": 2})
    assert Path("run/config.yaml").read_text().startswith("steps: 9\n")
    assert read_lines(Path("run/metrics.jsonl")) == [{"step": 1}, {"step": 2}]


def test_the_folder_is_free_after_the_other_has_ended() -> None:
    with another_process() as process:
        process.communicate("")
        assert process.returncode == 0
        with RunFolder(Path("run"), "steps: 9\n", 0, goes_on=True):
            pass
    with another_process():
        pass


def test_a_file_system_without_locks_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", refuse)
    with RunFolder(Path("run"), "steps: 1\n", 0) as run:
        run.log({"step": 1})
    assert read_lines(Path("run/metrics.jsonl")) == [{"step": 1}]


def test_a_name_that_nobody_chose_changes_until_it_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the choice of the name and the start of the run another run may take it."""

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2026, 3, 4, 5, 6, 7)

    monkeypatch.setattr("dppo_cli.training.run_folder.datetime", Clock)
    chosen = Path("runs/2026-03-04_05-06-07")
    late = RunFolder(chosen, "steps: 9\n", 0, named=False)
    with RunFolder(chosen, "steps: 1\n", 0, named=False) as run:
        run.log({"step": 1})
    with late:
        late.log({"step": 1})
    assert (run.path, late.path) == (chosen, Path("runs/2026-03-04_05-06-07_2"))
    assert (chosen / "config.yaml").read_text().startswith("steps: 1\n")
    assert Path("runs/last").resolve() == late.path.resolve()


def test_an_unnamed_folder_that_was_filled_while_the_model_was_loading_gets_another(work: Path) -> None:
    chosen = Path("runs/2026-03-04_05-06-07")
    with RunFolder(chosen, "steps: 1\n", 0, named=False) as first:
        first.log({"step": 1})
    second = RunFolder(chosen, "steps: 2\n", 0, named=False)
    assert second.path != chosen
    with second:
        second.log({"step": 1})
    assert (chosen / "config.yaml").read_text().startswith("steps: 1\n")
