"""Runs the program in a response against the tests of its problem, in the sandbox. Imports no torch."""

import json
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dppo_cli.errors import RewardError
from dppo_cli.reward.functions import sandbox
from dppo_cli.reward.patterns import TooSlowError, compiled, last_match

KEY = "reward.pattern"
RUNNER = """
import json, os, sys
work = json.load(sys.stdin)
results = os.fdopen(os.dup(1), "w")
null = os.open(os.devnull, os.O_RDWR)
os.dup2(null, 0), os.dup2(null, 1)
names = {"__name__": "program"}
exec(compile(work["program"], "program.py", "exec"), names)
for number, test in enumerate(work["tests"]):
    try:
        exec(compile(test, f"test {number + 1}", "exec"), names)
    except BaseException as error:
        print(f"test {number + 1}: {type(error).__name__}: {error}"[:200], file=sys.stderr, flush=True)
    else:
        print(work["word"], number, file=results, flush=True)
results.close()
"""
"""Runs a program, then tests in the same names, and says of each that passes, with a secret word."""
NONE_PASSED = "none of its assertions passed"

try:
    sandbox.check()
except sandbox.SandboxError as error:
    raise RewardError(
        f"reward=code locks programs up with namespaces of Linux 5.14 or newer, and cannot here ({error}); use a "
        "machine or container that allows user namespaces (docs/rewards.md)"
    ) from None


@dataclass(frozen=True)
class Test:
    """Code that raises an exception if the program is wrong; or an input, and the output that belongs to it."""

    code: tuple[str, ...] = ()
    input: str = ""
    output: str = ""


def score(
    completions: Sequence[str],
    tests: Sequence[Any],
    entry_point: Sequence[str | None],
    log_extra: Callable[[str, Sequence[Any]], None],
    pattern: str | None,
    partial: bool,
    max_tests: int,
    limits: Sequence[Any],
) -> list[float | None]:
    """The share of tests that each program passes, or 1.0 where it passes all; None where a problem has no tests."""
    of_all = sandbox.Limits(*limits)
    found: list[tuple[float | None, str]] = []
    for text, given, entry in zip(completions, tests, entry_point, strict=True):
        try:
            read = read_tests(given, entry)[:max_tests]
            program = text if pattern is None else last_match(KEY, compiled(KEY, pattern), text)
            found.append(_score(program, read, partial, of_all))
        except (_NotJudgedError, TooSlowError) as error:
            found.append((None, str(error)))
    log_extra("note", [note for _, note in found])
    return [value for value, _ in found]


class _NotJudgedError(Exception):
    """The text says why."""


def read_tests(given: Any, entry_point: str | None) -> list[Test]:
    """The tests of a row, in any of the forms that docs/rewards.md lists."""
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError):  # Code, then.
            given = json.loads(given)
    if isinstance(given, dict) and isinstance(given.get("inputs"), list) and isinstance(given.get("outputs"), list):
        if given.get("fn_name"):
            raise _NotJudgedError("the problem's tests call a function by name (fn_name), which is not supported")
        given = [{"input": i, "output": o} for i, o in zip(given["inputs"], given["outputs"], strict=False)]
    if isinstance(given, str) and given.strip():
        given = [f"{given}\ncheck({entry_point})" if entry_point else given]
    if not isinstance(given, list) or not given:
        raise _NotJudgedError("the problem has no tests")
    if all(isinstance(test, str) for test in given):
        return [Test(code=tuple(given))]
    if all(isinstance(test, dict) and "input" in test and "output" in test for test in given):
        return [Test(input=_text(test["input"]), output=_text(test["output"])) for test in given]
    raise _NotJudgedError("the problem's tests have a form that is not known")


def _text(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _score(program: str | None, tests: Sequence[Test], partial: bool, limits: sandbox.Limits) -> tuple[float, str]:
    if not program:
        return 0.0, "no program was found"
    passed = total = 0
    notes: list[str] = []
    for number, test in enumerate(tests):
        ok, note = _assertions(program, test.code, limits) if test.code else _in_and_out(program, test, limits)
        count = len(test.code) or 1
        passed, total = passed + ok, total + count
        if ok < count:
            notes.append(note if test.code else f"test {number + 1}: {note}")
            if not partial:
                break
    if passed == total:
        return 1.0, ""
    return passed / total if partial else 0.0, "; ".join(notes[:3])


def _assertions(program: str, tests: Sequence[str], limits: sandbox.Limits) -> tuple[int, str]:
    """How many tests passed, and what is wrong with the others."""
    word = secrets.token_hex(16)
    work = json.dumps({"program": program, "tests": tests, "word": word}).encode()
    outcome = _run(lambda: sandbox.python("-c", RUNNER), limits, work)
    lines = outcome.output.decode(errors="replace").splitlines()
    passed = {f"{word} {number}" for number in range(len(tests))} & set(lines)
    return len(passed), outcome.stopped or _last_line(outcome) or NONE_PASSED


def _in_and_out(program: str, test: Test, limits: sandbox.Limits) -> tuple[int, str]:
    def job() -> None:
        with open("program.py", "w", encoding="utf-8") as file:
            file.write(program)
        sandbox.python("program.py")

    outcome = _run(job, limits, test.input.encode())
    if outcome.stopped or outcome.status:
        return 0, outcome.stopped or _last_line(outcome) or f"it ended with status {outcome.status}"
    # Neither white space nor the end of a line counts, as in contests.
    return (1, "") if outcome.output.decode(errors="replace").split() == test.output.split() else (0, "wrong output")


def _run(job: Callable[[], None], limits: sandbox.Limits, stdin: bytes) -> sandbox.Outcome:
    outcome = sandbox.run(job, limits, stdin=stdin)
    if outcome.stopped == sandbox.SHORT_OF_MEMORY:
        raise _NotJudgedError(outcome.stopped)
    return outcome


def _last_line(outcome: sandbox.Outcome) -> str:
    """What Python says last of an exception."""
    lines = outcome.errors.decode(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else ""
