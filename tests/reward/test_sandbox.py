"""Programs in the sandbox: what they can do, and that each ends in time and within its limits."""

import os
import time
from dataclasses import replace

import pytest
from locked_up import LIMITS, needs_namespaces, printed, run

from dppo_cli.reward.functions import sandbox
from dppo_cli.reward.functions.sandbox import Limits

pytestmark = needs_namespaces


# What it is for


def test_a_program_reads_computes_and_prints():
    assert printed("print(sum(map(int, input().split())))", stdin=b"1 2 3\n") == "6\n"
    assert printed("import json, math; print(json.dumps(math.pi))") == "3.141592653589793\n"


def test_status_and_errors_come_back():
    assert run("import sys; sys.exit(3)").status == 3
    outcome = run("1 / 0")
    assert outcome.status == 1
    assert outcome.errors.endswith(b"ZeroDivisionError: division by zero\n")
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").status == -11


def test_a_job_need_not_be_a_program():
    limits = Limits(30.0, 2**33, 16, 2**20, 1000)  # with all the memory of this process
    assert sandbox.run(lambda: print(os.write(1, os.getcwd().encode())), limits).output == b"/program"


def test_it_may_use_files_processes_and_threads_of_its_own():
    source = """
        import multiprocessing, tempfile, threading
        threading.Thread(target=print, args=("thread",)).start()
        with tempfile.TemporaryFile() as file:
            print(file.write(b"x" * 1000))
        if __name__ == "__main__":
            with multiprocessing.Pool(2) as pool:
                print(pool.map(abs, [-1, 2]))
    """
    assert printed(source).split("\n") == ["thread", "1000", "[1, 2]", ""]


# Time


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')",
        "import signal, time; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals()); time.sleep(600)",
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "import os, time\nif os.fork(): time.sleep(600)\nos.setsid(); time.sleep(600)",
    ],
    ids=["loop", "regular_expression", "signals", "fork_bomb", "sessions"],
)
def test_a_program_that_does_not_end_is_killed_with_all_it_started(source):
    assert run(source, limits=Limits(1.0, 2**28, 16, 2**20, 1000)).stopped == "it took longer than 1 seconds"


def test_what_a_program_leaves_behind_ends_with_it():
    source = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(600)"
    assert run(source).stopped == ""


# Memory, processes, disk, output


@pytest.mark.parametrize(
    "source",
    [
        "bytearray(10 * 2**30)",
        "x = []\nwhile True: x.append(bytearray(10**7))",
        "import mmap\nm = mmap.mmap(-1, 10 * 2**30)",
    ],
    ids=["at_once", "slowly", "shared"],
)
def test_too_much_memory_is_refused(source):
    outcome = run(source)
    assert outcome.status == 1
    assert b"MemoryError" in outcome.errors or b"Cannot allocate memory" in outcome.errors


@pytest.mark.parametrize(
    "source",
    [
        """
        import mmap
        m = mmap.mmap(-1, 2**29)
        for i in range(0, 2**29, 4096): m[i] = 1
        """,
        """
        import os, time
        for _ in range(8):
            if os.fork() == 0: break
        x = bytearray(b"x") * 2**26
        time.sleep(600)
        """,
    ],
    ids=["shared", "of_many_processes"],
)
def test_memory_of_all_its_processes_counts(source):
    assert run(source).stopped == "it used too much memory"


def test_processes_and_threads_are_counted():
    source = """
        import os, threading, time
        children = []
        try:
            while len(children) < 1000: children.append(os.fork() or time.sleep(600))
        except BlockingIOError:
            print(len(children))
    """
    assert printed(source) == "15\n"


def test_the_disk_is_small():
    source = """
        n = 0
        try:
            while True:
                open(f"f{n}", "wb").write(b"x" * 2**20)
                n += 1
        except OSError as error:
            print(n, error.strerror)
    """
    assert printed(source) in ("7 No space left on device\n", "8 No space left on device\n")


@pytest.mark.parametrize("stream", ["out", "err"])
def test_printing_gigabytes(stream):
    outcome = run(f"import sys\nwhile True: print('x' * 10000, file=sys.std{stream})")
    assert outcome.stopped == "it printed too much"
    assert len(outcome.output) < 200_000


def test_a_machine_that_runs_short_of_memory_stops_it(monkeypatch):
    monkeypatch.setattr(sandbox, "LEAST_LEFT", 1.1)
    assert run("import time; time.sleep(600)").stopped == sandbox.SHORT_OF_MEMORY


def test_the_callers_memory_is_not_the_jobs():
    """A job shares the pages of what started it until it starts a program, which takes longer on a busy machine."""
    held = bytearray(os.urandom(2**20)) * 1200

    def job() -> None:
        time.sleep(0.4)
        os.write(1, b"done\n")

    outcome = sandbox.run(job, replace(LIMITS, memory=64 * 2**20))
    assert (outcome.output, outcome.status, outcome.stopped) == (b"done\n", 0, "")
    assert len(held) == 1200 * 2**20
