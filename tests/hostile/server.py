"""Runs command lines of `dppo`, each in a fork of a process that has imported everything: `python server.py`.

A line of its input is a job in JSON, a line of its output the exit status: negative for a signal, null for a job that
was killed because it took too long. An audit hook in the forks writes down what their Python code does outside the
job's folder, and which code in the folder runs.
"""

import contextlib
import gc
import io
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from types import CodeType
from typing import Any

import hydra.core.plugins
import hydra.main
import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import dppo_cli.commands.compare
import dppo_cli.commands.data
import dppo_cli.commands.evaluate
import dppo_cli.commands.export
import dppo_cli.commands.plan
import dppo_cli.commands.report
import dppo_cli.commands.resume
import dppo_cli.commands.runs
import dppo_cli.commands.sample
import dppo_cli.commands.train  # noqa: F401
from dppo_cli.cli.main import main

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "shutil.rmtree")
NETWORK_AND_SHELL = ("os.system", "os.exec", "socket.connect")
SLEEP = 0.005


def serve() -> None:
    hydra.core.plugins.Plugins.instance()
    gc.collect()
    gc.freeze()
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), file=answers, flush=True)


def run(words: list[str], environment: dict[str, str], root: str, seconds: float, memory: int) -> int | None:
    """The exit status of a command line in the folder `root`/work."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            prepare(environment, root, memory)
            sys.argv = ["dppo", *words]
            status = main(words)
            sys.stdout.flush()
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
        except BaseException:
            traceback.print_exc()
            with contextlib.suppress(Exception):
                sys.stdout.flush()
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while (ended := os.waitpid(process, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(SLEEP)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process, signal.SIGKILL)  # And what it has started.
    if ended[0] == 0:
        os.waitpid(process, 0)
        return None
    return os.waitstatus_to_exitcode(ended[1])


def prepare(environment: dict[str, str], root: str, memory: int) -> None:
    """Make this process what a shell in `root`/work would start."""
    os.setsid()
    os.chdir(f"{root}/work")
    own = {"HOME": f"{root}/home", "XDG_CONFIG_HOME": f"{root}/config", "TMPDIR": f"{root}/temporary"}
    os.environ.update({**own, "COLUMNS": "120", **environment})
    tempfile.tempdir = None
    for number, name in ((1, "output.txt"), (2, "errors.txt")):
        os.dup2(os.open(f"{root}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), encoding, "strict")
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), encoding, "backslashreplace", line_buffering=True)
    torch.set_num_threads(1)
    with open("/proc/self/statm", encoding="ascii") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    watch(root)


def watch(root: str) -> None:
    """Write into audit.txt what is done outside of `root`, and what code in it runs."""
    log = os.open(f"{root}/audit.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return not f"{os.path.abspath(os.fsdecode(path))}/".startswith((f"{root}/", "/dev/", "/proc/"))

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            found = isinstance(args[2], int) and bool(args[2] & WRITES) and outside(args[0])
        elif event == "exec":
            found = isinstance(args[0], CodeType) and args[0].co_filename.startswith(f"{root}/")
        else:
            # What a symbolic link points at is not changed by it.
            paths = args[1:2] if event == "os.symlink" else args[:2]
            found = event in NETWORK_AND_SHELL or (event in CHANGES and any(map(outside, paths)))
        if found:
            what = args[0].co_filename if event == "exec" else args[0]
            os.write(log, f"{event} {what!a}\n".encode())

    sys.addaudithook(hook)


if __name__ == "__main__":
    serve()
