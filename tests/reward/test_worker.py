"""The process of a reward function: what it does does not reach the trainer, and it does not outlive its pool."""

import gc
import os
import random
import signal
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import make
import pytest
import torch
from functions import alive, function, scored, values, workers_of
from helpers import train

from dppo_cli.reward.scorer import Scorer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")

DOUBLE = """
import os, signal, subprocess, sys, threading, time
children = []
def score(prompts, completions, **columns):
    {quirk}
    return [2 * float(text) for text in completions]
"""

Loaded = Callable[..., Scorer]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """`load("os.chdir('/')")`: the scorer of a function that does this in each call, and doubles numbers."""
    monkeypatch.chdir(tmp_path)

    def loaded(quirk: str, timeout: float = 60.0) -> Scorer:
        (tmp_path / "mine.py").write_text(DOUBLE.format(quirk=quirk))
        return function("mine.py:score", timeout=timeout).load(make.fail)

    return loaded


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


# What does not reach the trainer


@pytest.mark.parametrize(
    "quirk",
    [
        "os.chdir('/')",
        "os.environ.clear()",
        "sys.path.clear()",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)",
        "sys.stdin.read()",
        "sys.stdout.close(); sys.stderr.close()",
        "os.closerange(0, 3)",
        "[threading.Thread(target=time.sleep, args=(600,)).start() for _ in range(20)]",
        "__import__('random').seed(0)",
    ],
)
def test_a_function_may_do_what_it_likes_to_its_process(load: Loaded, quirk: str) -> None:
    before = os.getcwd(), dict(os.environ), list(sys.path), random.getstate(), signal.getsignal(signal.SIGTERM)
    scorer = load(quirk)
    for _ in range(2):
        assert values(scored(scorer, ["1", "2"], ["3"])) == [[2.0, 4.0], [6.0]]
    assert (
        os.getcwd(),
        dict(os.environ),
        list(sys.path),
        random.getstate(),
        signal.getsignal(signal.SIGTERM),
    ) == before


@pytest.mark.parametrize("child", ["pass", "1 / 0", "sys.exit()"])
def test_a_fork_that_comes_back_gives_no_second_answer(load: Loaded, child: str) -> None:
    """It would be taken for the answer to the next call."""
    scorer = load(f"if os.fork() == 0:\n        {child}")
    for number in range(4):
        assert values(scored(scorer, [str(number)])) == [[2.0 * number]]


def test_torch_as_the_trainer_has_it_stays(load: Loaded) -> None:
    before = torch.get_rng_state(), torch.get_num_threads(), torch.relu, torch.get_default_dtype()
    quirk = "import torch; torch.set_grad_enabled(False); torch.relu = None; torch.manual_seed(5); "
    quirk += "torch.set_num_threads(2); torch.set_default_dtype(torch.float64)"
    assert values(scored(load(quirk), ["1"])) == [[2.0]]
    assert torch.is_grad_enabled()
    after = torch.get_rng_state(), torch.get_num_threads(), torch.relu, torch.get_default_dtype()
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


def test_what_a_function_prints_goes_to_standard_error_at_once(
    load: Loaded, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    scorer = load("print('looking at', completions)")
    assert values(scored(scorer, ["1"])) == [[2.0]]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "looking at ['1']\n")


def test_a_flood_of_prints(load: Loaded, capfd: pytest.CaptureFixture[str]) -> None:
    scorer = load("[print('x' * 999) for _ in range(5000)]; os.write(1, b'y' * 10**6)")
    assert values(scored(scorer, ["1"])) == [[2.0]]
    captured = capfd.readouterr()
    assert captured.out == ""
    assert len(captured.err) == 6 * 10**6


# The end of a process


def test_no_process_and_no_child_is_left_when_the_pool_is_dropped(load: Loaded, tmp_path: Path) -> None:
    gc.collect()
    before = workers_of(os.getpid())
    quirk = "children.extend(subprocess.Popen(['sleep', '600']) for _ in range(50)); "
    quirk += "open('pids', 'w').write(' '.join(str(c.pid) for c in children))"
    scorer = load(quirk)
    assert values(scored(scorer, ["1"])) == [[2.0]]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert len(pids) == 50
    assert wait_for(lambda: all(map(alive, pids)))
    assert len(workers_of(os.getpid())) == len(before) + 1
    del scorer
    assert workers_of(os.getpid()) == before
    assert wait_for(lambda: not any(map(alive, pids)))


def test_children_of_a_call_that_hangs_end_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quirk = "open('pids', 'a').write(f'{subprocess.Popen([\"sleep\", \"600\"]).pid} '); time.sleep(600)"
    (tmp_path / "mine.py").write_text(DOUBLE.format(quirk=quirk))
    scorer = function("mine.py:score", timeout=0.5).load(lambda text: None)
    assert values(scored(scorer, ["1"])) == [[None]]
    pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
    assert pids
    assert wait_for(lambda: not any(map(alive, pids)))


def test_a_worker_that_hangs_dies_with_its_trainer(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        DOUBLE.format(quirk="open('made', 'w').write(str(os.getpid())); os.rename('made', 'pid'); time.sleep(600)")
    )
    trainer = """
        from dppo_cli.calls.pool import Pool
        Pool("mine.py:score", 1, 600.0, 8.0).call(({"prompts": ["p"], "completions": ["1"]}, 0))
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(trainer)], cwd=tmp_path)
    try:
        assert wait_for((tmp_path / "pid").exists, 60.0)
        worker = int((tmp_path / "pid").read_text())
        assert wait_for(lambda: alive(worker))
    finally:
        process.kill()
        process.wait()
    assert wait_for(lambda: not alive(worker))


def test_a_trainer_that_is_interrupted_while_calls_wait_ends_at_once(tmp_path: Path) -> None:
    """Ctrl-C reaches the main thread, and the others wait for their workers."""
    (tmp_path / "mine.py").write_text(DOUBLE.format(quirk="open('called', 'w').close(); time.sleep(600)"))
    trainer = """
        import signal
        from dppo_cli.calls.pool import Pool
        # A shell has its background jobs ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        pool = Pool("mine.py:score", 2, 600.0, 8.0)
        try:
            calls = [pool.begin(({"prompts": ["p"], "completions": ["1"]}, 0)) for _ in range(8)]
            [call.result() for call in calls]
        except BaseException:
            pool.give_up()
            raise
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(trainer)], cwd=tmp_path, stderr=subprocess.DEVNULL
    )
    try:
        assert wait_for((tmp_path / "called").exists, 60.0)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=10)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ((), 0),
        (("-m", "seed=1"), 0),
        (("reward.path=rewards.py:broken",), 2),
        (("-m", "seed=1", "reward.path=rewards.py:broken"), 2),
    ],
    ids=["run", "sweep", "run_that_fails", "sweep_that_fails"],
)
def test_no_process_is_left_after_a_run(model: Path, work: Path, words: tuple[str, ...], status: int) -> None:
    """Nor the model in memory, which the next job of a sweep may need: nothing waits for the garbage collector."""
    gc.collect()
    before = workers_of(os.getpid())
    gc.disable()
    try:
        assert train(model, "steps=1", *words, "run_dir=run") == status
        assert workers_of(os.getpid()) == before
    finally:
        gc.enable()


# What it costs


def test_a_call_costs_little(load: Loaded, record_property: Callable[[str, object], None]) -> None:
    scorer = load("pass")
    prompts = [make.prompt(i, answer="1") for i in range(8)]
    completions = [[make.completion(text="1" * 300) for _ in range(8)] for _ in range(8)]
    seconds = []
    for _ in range(51):
        start = time.perf_counter()
        scorer(prompts, completions)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds)
    record_property("median_seconds", median)
    assert median < 0.05
