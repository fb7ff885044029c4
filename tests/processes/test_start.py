"""Workers that are processes: started here, or by a launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dppo_cli.processes.start
from dppo_cli.errors import ConfigError, RunError
from dppo_cli.processes.start import crew_of
from dppo_cli.world import World

WORKER = """
import os, signal
import torch
from dppo_cli.processes.crew import serve

def work(line, world):
    def total(value):
        values = [torch.tensor([value, 1.0]), torch.tensor(value)]
        world.sum(values)
        return values

    def facts():
        return world.rank, world.size, os.getpid(), torch.get_num_threads()

    serve(line, {"total": total, "facts": facts, "die": lambda: os.kill(os.getpid(), signal.SIGKILL)})
"""

LAUNCHED = """
import sys, torch
from dppo_cli.processes.crew import serve
from dppo_cli.processes.start import crew_of, launched_worker
from dppo_cli.world import World

with World.launched("cpu") as world:
    if not world.is_main:
        serve(launched_worker(world), {"rank": lambda: world.rank, "sum": lambda: world.sum([torch.tensor(2.0)])})
        sys.exit()
    with crew_of(world, 1, "cpu", "nothing", print) as crew:
        crew.begin_all("rank")
        ranks = crew.ended()
        crew.begin_all("sum")
        value = torch.tensor(1.0)
        world.sum([value])
        crew.ended()
        print("found", ranks, crew.size, float(value), world.is_main)
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of a module that is found as a user's is: by sys.path."""
    (tmp_path / "some_worker.py").write_text(WORKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "some_worker:work"


def test_processes_that_are_started_here(work: str) -> None:
    threads = torch.get_num_threads()
    with crew_of(World(), 3, "cpu", work, pytest.fail) as crew:
        assert crew.size == 3
        crew.begin_all("facts")
        facts = crew.ended()
        assert [fact[:2] for fact in facts] == [(1, 3), (2, 3)]
        assert [fact[3] for fact in facts] == [torch.get_num_threads()] * 2 == [1, 1]
        crew.begin("total", [(10.0,), (100.0,)])
        mine = [torch.tensor([1.0, 1.0]), torch.tensor(1.0)]
        crew.world.sum(mine)
        for found in ([part.tolist() for part in parts] for parts in (*crew.ended(), mine)):
            assert found == [[111.0, 3.0], 111.0], "all have the sum, in place"
    assert torch.get_num_threads() == threads
    for fact in facts:
        with pytest.raises(ProcessLookupError):
            os.kill(fact[2], 0)
    with crew_of(World(), 2, "cpu", work, pytest.fail) as again:  # as the next job of a sweep does
        again.begin("total", [(10.0,)])
        again.world.sum([torch.tensor([1.0, 1.0]), torch.tensor(1.0)])
        assert again.ended()[0][1] == 11.0


def test_a_worker_that_is_killed_and_one_that_does_not_end(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dppo_cli.processes.start, "PATIENCE", 0.5)
    started = time.monotonic()
    with crew_of(World(), 3, "cpu", work, pytest.fail) as crew:
        crew.begin_all("facts")
        pids = [fact[2] for fact in crew.ended()]
        os.kill(pids[1], signal.SIGSTOP)
        crew.lines[0].send(("die", ()))
        crew.answers = {}
        with pytest.raises(RunError, match=r"^process 2 of 3 has ended: SIGKILL$"):
            crew.ended()
    assert time.monotonic() - started < 30
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_cannot_be_started(capfd: pytest.CaptureFixture[str]) -> None:
    with (
        pytest.raises(RunError, match=r"^process 2 of 2 could not be started: what it wrote last says why$"),
        crew_of(World(), 2, "cpu", "no_such_module:work", pytest.fail),
    ):
        pytest.fail("it was not started")
    assert "No module named 'no_such_module'" in capfd.readouterr().err


def test_one_process_needs_nothing() -> None:
    with crew_of(World(), 1, "mps", "no_such_module:work", pytest.fail) as crew:
        assert crew.size == 1 and crew.lines == []


def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    def refused(world: World, processes: int, device: str) -> str:
        with pytest.raises(ConfigError) as raised:
            crew_of(world, processes, device, "no_such_module:work", pytest.fail)
        return str(raised.value)

    expected = "hardware.processes=4, and torch sees 2 GPUs here: each process needs one"
    assert refused(World(), 4, "cuda") == expected
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    expected = "hardware.processes=9 is more than 4 for each of the 2 cores here"
    assert refused(World(), 9, "cpu") == expected
    expected = "hardware.processes=4, but the launcher has started 2; leave one of them out"
    assert refused(World(0, 2), 4, "cuda") == expected
    expected = "hardware.device=mps is one GPU, and each of 2 processes needs one"
    assert refused(World(), 2, "mps") == refused(World(0, 2), 1, "mps") == expected


def test_processes_that_a_launcher_has_started(tmp_path: Path) -> None:
    (tmp_path / "launched.py").write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "launched.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "found [1] 2 3.0 True" in done.stdout
