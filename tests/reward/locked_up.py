"""What tests of the sandbox share: programs that run in it, and why none can here."""

import os
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
from functions import command_of, processes

from dppo_cli.reward.functions import sandbox
from dppo_cli.reward.functions.sandbox import Limits, Outcome


def reason_to_skip() -> str:
    try:
        sandbox.check()
    except sandbox.SandboxError as error:
        return f"no namespaces here: {error}"
    return ""


WHY_NOT = reason_to_skip()
needs_namespaces = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "none")

PROGRAM = f"program_of_test_{os.getpid()}.py"  # another file of tests may run beside this one
LIMITS = Limits(seconds=3.0, memory=256 * 2**20, processes=16, disk=8 * 2**20, output=64 * 2**10)


def run(source: str, stdin: bytes = b"", limits: Limits = LIMITS) -> Outcome:
    def job() -> None:
        Path(PROGRAM).write_text(textwrap.dedent(source))
        sandbox.python(PROGRAM)

    start = time.monotonic()
    outcome = sandbox.run(job, limits, stdin=stdin)
    assert time.monotonic() - start < limits.seconds + 5
    assert not [pid for pid in processes() if PROGRAM.encode() in command_of(pid)]
    return outcome


def printed(source: str, **options: bytes) -> str:
    # It takes a while to fork a process that has run many tests.
    outcome = run(source, limits=replace(LIMITS, seconds=30.0), **options)
    assert (outcome.status, outcome.stopped) == (0, ""), outcome.errors.decode()
    return outcome.output.decode()
