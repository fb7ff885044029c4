"""Workers that are processes: started here, or by a launcher."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch

import dppo_cli.processes.start
from dppo_cli.errors import ConfigError, RunError
from dppo_cli.processes.crew import DONE
from dppo_cli.processes.start import crew_of, launched_worker
from dppo_cli.world import World

WORKER = """
import os, signal
from functools import partial
import torch
from dppo_cli.processes.crew import serve
from dppo_cli.processes.worker import join

def work(line, world):
    def total(value):
        values = [torch.tensor([value, 1.0]), torch.tensor(value)]
        world.sum(values)
        return values

    def facts():
        return world.rank, world.size, os.getpid(), torch.get_num_threads()

    methods = {"total": total, "facts": facts, "die": lambda: os.kill(os.getpid(), signal.SIGKILL)}
    serve(line, {"join": partial(join, world), **methods})
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
        pytest.raises(RunError, match=r"^process 2 of 2 has ended: what it wrote last says why$"),
        crew_of(World(), 2, "cpu", "no_such_module:work", pytest.fail),
    ):
        pytest.fail("it was not started")
    assert "No module named 'no_such_module'" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("join", "message"),
    [
        ("os.kill(os.getpid(), 9)", "process 2 of 2 has ended: SIGKILL"),
        ("raise OSError('no device')", "the 2 processes cannot reach each other: process 2 of 2: OSError: no device"),
    ],
)
def test_a_worker_that_does_not_join(work: str, tmp_path: Path, monkeypatch, join: str, message: str) -> None:
    """The main process waits for it in torch, which would do so for half an hour. The next job of a sweep can start."""
    text = f"import os\nfrom dppo_cli.processes.crew import serve\n\ndef join(*_):\n    {join}\n\n"
    (tmp_path / "lost_worker.py").write_text(f"{text}def work(line, world):\n    serve(line, {{'join': join}})\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    started = time.monotonic()
    with pytest.raises(RunError) as raised, crew_of(World(), 2, "cpu", "lost_worker:work", pytest.fail):
        pytest.fail("they have met")
    assert str(raised.value) == message
    with crew_of(World(), 2, "cpu", work, pytest.fail) as crew:
        crew.begin("total", [(2.0,)])
        crew.world.sum([torch.ones(2), torch.tensor(1.0)])
        assert crew.ended()[0][1] == 3.0
    assert time.monotonic() - started < 30


def test_a_launched_worker_that_comes_late_and_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are in the order of ranks; who does not know the key has none."""
    told: list[Any] = []

    @dataclass(frozen=True)
    class Launched(World):
        def broadcast(self, value: Any) -> Any:
            if self.is_main:
                told.append(value)
            return told[0]

    def arrive(rank: int) -> None:
        while not told:
            time.sleep(0.01)
        line = launched_worker(Launched(rank, 3))
        assert line is not None
        line.send((DONE, rank))
        arrived.set()
        assert line.receive() == ("bye", ())

    def stranger() -> None:
        while not told:
            time.sleep(0.01)
        with socket.create_connection(told[0][0]) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(AuthenticationError, OSError, EOFError):
            Client(told[0][0], authkey=b"guessed")
        arrive(2)

    arrived = Event()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    threads = [Thread(target=stranger), Thread(target=lambda: (arrived.wait(30), arrive(1)))]
    monkeypatch.setattr(dppo_cli.processes.start, "CONNECTING", 30.0)
    for thread in threads:
        thread.start()
    with crew_of(Launched(0, 3), 1, "cpu", "nothing", pytest.fail) as crew:
        crew.answers = {}
        assert crew.ended() == [1, 2]
        crew.begin_all("bye")
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_a_launched_worker_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dppo_cli.processes.start, "CONNECTING", 0.1)
    monkeypatch.setattr(World, "broadcast", lambda self, value: value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with (
        pytest.raises(RunError, match=r"no connection from process 2, 3 of 3 within 0.1 seconds; .* 127.0.0.1"),
        crew_of(World(0, 3), 1, "cpu", "nothing", pytest.fail),
    ):
        pytest.fail("nobody came")


def test_a_worker_without_a_main_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(self: World, value: Any) -> Any:
        raise RuntimeError("Connection closed by peer")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(World, "broadcast", lambda self, value: (("127.0.0.1", port), b"key"))
    with pytest.raises(RunError, match=f"^the main process cannot be reached at 127.0.0.1, port {port}: .*refused"):
        launched_worker(World(1, 2))
    monkeypatch.setattr(World, "broadcast", ended)
    assert launched_worker(World(1, 2)) is None, "it has said why"
    with (
        pytest.raises(RunError, match=r"^the 2 processes cannot reach each other: Connection closed by peer$"),
        crew_of(World(0, 2), 1, "cpu", "nothing", pytest.fail),
    ):
        pytest.fail("they have met")


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
    expected = "hardware.device=mps is one GPU, and each of 2 processes needs one"
    assert refused(World(), 2, "mps") == refused(World(0, 2), 1, "mps") == expected


def test_processes_that_a_launcher_has_started(tmp_path: Path) -> None:
    (tmp_path / "launched.py").write_text(LAUNCHED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", "launched.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "found [1, 2, 3] 4 7.0 True" in done.stdout, "in the order of their ranks"
