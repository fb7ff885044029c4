"""One command line of `dppo` in a folder of its own, and what must hold for every one of them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Queue
from typing import Any

from safetensors.torch import load_file

SECONDS = 60
"""A case that takes longer hangs."""
MEMORY = 4 * 2**30
"""Bytes that a case may map beyond what the imports have."""
SMALL = ("batch.prompts_per_step=4", "batch.prompts_per_update=4", "data.eval_problems=4", "steps=1")
"""`dppo train` in half a second."""
CONFIG_FOLDERS = ("config", "home/.config")  # XDG_CONFIG_HOME, and what an empty one stands for
MAY_COME = {"canary-ran", *CONFIG_FOLDERS, *(f"{f}/dppo{key}" for f in CONFIG_FOLDERS for key in ("", "/key"))}
OURS = ("runs", "sweeps", "evals", "comparisons")
"""Folders in the working folder that dppo writes without being told to."""
MAY_STAY = ("work/runs", "work/runs/last", "work/evals", "work/comparisons")
"""What a refused command may leave."""
WARNS = ("warning: ", "dppo: warning: ")
PHASE = re.compile(r"[a-z][\w /,-]*( \.\.\.|: \d+ s)\n")
"""A line of telemetry/phases.py."""
LONGEST = 3000
"""Characters of an error message, besides those that were typed."""
CANARY = """\
open({marker!r}, "a").write(__name__)


def f(prompts, completions, **columns):
    return [0.5] * len(prompts)
"""
"""canary.py, in the working folder and beside it."""
SHOWN = 3
"""Cases shown of each kind of failure."""


@dataclass(frozen=True)
class Case:
    """`words`: the command line. `arrange` puts what it needs into the working folder. `named`: folders there that the
    words allow to be written, "*" for any new one. `detail`: what its own checks want to know.
    """

    words: tuple[str, ...]
    arrange: Callable[[Path], None] | None = None
    about: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    named: tuple[str, ...] = ()
    may_run_canary: bool = False
    detail: Any = None

    def __str__(self) -> str:
        environment = "".join(f"{name}={value} " for name, value in self.environment.items())
        words = " ".join(ascii(word) if len(word) < 200 else f"{word[:40]!a}...({len(word)})" for word in self.words)
        return f"{environment}dppo {words}   # {self.about}"


@dataclass(frozen=True)
class Result:
    """What a case left. `new`, `changed`: paths around `work`, its working folder. `audit`: see server.py."""

    case: Case
    status: int | None
    out: str
    err: str
    work: Path
    new: list[str]
    changed: list[str]
    audit: list[str]


class Server:
    """A process that forks one for each case (server.py)."""

    def __init__(self) -> None:
        # -P: the folder of these tests is on no user's path. No case asks the hub.
        command = [sys.executable, "-P", str(Path(__file__).with_name("server.py"))]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def run(self, case: Case, root: Path) -> int | None:
        """The exit status; None if the case did not end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        job = {"words": case.words, "environment": dict(case.environment), "root": str(root)}
        self.process.stdin.write(json.dumps({**job, "seconds": SECONDS, "memory": MEMORY}) + "\n")
        self.process.stdin.flush()
        status: int | None = json.loads(self.process.stdout.readline())
        return status

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def run(case: Case, root: Path, server: Server) -> Result:
    """Run a case in `root`, a new folder."""
    work = root / "work"
    for name in ("work", "home", "config", "temporary", "beside"):
        (root / name).mkdir(parents=True)
    for folder in (work, root / "beside"):
        (folder / "canary.py").write_text(CANARY.format(marker=str(root / "canary-ran")), encoding="utf-8")
    (root / "home/.profile").write_text("# mine\n", encoding="utf-8")
    if case.arrange is not None:
        case.arrange(work)
    before = tree(root)
    status = server.run(case, root)
    after = tree(root)
    out, err, audit = (_read(root / name) for name in ("output.txt", "errors.txt", "audit.txt"))
    new = [path for path in after if path not in before]
    changed = [path for path, state in before.items() if after.get(path) != state]
    return Result(case, status, out, err, work, new, changed, audit.splitlines())


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", "replace")


def tree(root: Path) -> dict[str, Any]:
    """Kind, size and date of everything below a folder, links not followed, without the runner's own files."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            state = os.lstat(path)
            is_folder = name in folders and not os.path.islink(path)
            found[os.path.relpath(path, root)] = is_folder or (state.st_mode, state.st_size, state.st_mtime_ns)
    return {path: state for path, state in found.items() if path not in ("output.txt", "errors.txt", "audit.txt")}


def problems(result: Result) -> list[str]:
    """What is wrong with a result, in words; empty where all is well."""
    return [text for check in (_ending, _places, _code, _results) for text in check(result)]


def _ending(result: Result) -> Iterator[str]:
    if {"TTY_COMPATIBLE", "FORCE_COLOR"} & set(result.case.environment):
        # A terminal, as the user says: what progress wrote there it has erased.
        result = replace(result, err=re.sub(r"(?s).*\x1b\[2K", "", result.err))
    # A library in a reward's process, of the memory that the user allows it.
    lines = [text for text in result.err.splitlines(keepends=True) if not text.startswith("OpenBLAS error")]
    # What takes seconds on a busy machine.
    lines = [text for text in lines if not PHASE.fullmatch(text)]
    lines = [text for text in lines if not text.startswith(WARNS)]
    result = replace(result, err="".join(lines))
    last = result.err.strip().splitlines()[-1][:300] if result.err.strip() else ""
    if result.status is None:
        yield f"hangs: {SECONDS} s"
    elif result.status not in (0, 1, 2):
        yield f"exit status {result.status}: {last}"
    if "Traceback" in result.err or "Traceback" in result.out:
        yield f"Traceback: {last or result.out.strip().splitlines()[-1][:300]}"
    elif result.status == 0 and result.err:
        yield f"status 0, but on stderr: {last}"
    elif result.status in (1, 2):
        if result.err.count("\n") != 1 or len(result.err.splitlines()) != 1 or not result.err.startswith("dppo: "):
            yield f"status {result.status}, and stderr is not one line: {result.err[:300]!r}"
        elif not result.err.removeprefix("dppo: ").strip():
            yield "an empty error message"
        elif len(result.err) > LONGEST + sum(map(len, result.case.words)):
            yield f"an error message of {len(result.err)} characters: {result.err[:200]!r}"


def _places(result: Result) -> Iterator[str]:
    named = {*OURS, *result.case.named}
    is_sweep = bool({"-m", "--multirun", "hydra.mode=MULTIRUN"} & set(result.case.words))
    for path in result.new:
        parts = Path(path).parts
        # reasoning-gym imports matplotlib, which keeps a list of fonts, in a temporary folder if it has no other.
        fonts = any(part == "matplotlib" or part.startswith("matplotlib-") for part in parts)
        if path in MAY_COME or fonts or path == "home/.cache" or "__pycache__" in parts:
            continue
        if parts[0] != "work" or not (parts[1] in named or "*" in named):
            yield f"wrote {path!r}"
        elif result.status == 2 and not is_sweep and path not in MAY_STAY and "is saved" not in result.err:
            yield f"status 2, but left {path!r}"
    for path in result.changed:
        parts = Path(path).parts
        if parts[0] != "work" or not (parts[1] in named or _is_overwritten(parts[1], result.case)):
            yield f"changed {path!r}"


def _is_overwritten(name: str, case: Case) -> bool:
    """Whether the command line says so."""
    words = {word.lstrip("+") for word in case.words}
    return {f"out={name}", "overwrite=true"} <= words


def _code(result: Result) -> Iterator[str]:
    for text in result.audit:
        if not (text.startswith("exec ") and result.case.may_run_canary):
            yield f"did: {text}"
    marker = result.work.parent / "canary-ran"
    if marker.exists() and not result.case.may_run_canary:
        yield "ran the canary"


def _results(result: Result) -> Iterator[str]:
    """A command that says it went well has real results."""
    if result.status != 0:
        return
    for name in [path for path in result.new + result.changed if Path(path).name == "summary.json"]:
        path = result.work.parent / name
        try:
            yield from _summary(path.parent, strict_json(path.read_text(encoding="utf-8")))
        except (ValueError, OSError) as error:
            yield f"{name}: {error}"


def _summary(folder: Path, summary: Mapping[str, Any]) -> Iterator[str]:
    if "difference" in summary:
        found, sides = summary["difference"], [summary[side]["accuracy"] for side in ("first", "second")]
        # None: not judged.
        if None in (*sides, found):
            right = found is None and None in sides
        else:
            right = all(0 <= side <= 1 for side in sides) and abs(found["mean"] - sides[0] + sides[1]) < 1e-9
        if not right:
            yield f"summary.json has the accuracies {sides} and the difference {found}"
        return
    for key in ("eval_before", "eval_after", "accuracy"):
        # None: not judged, by a reward that the data does not fit.
        if summary.get(key) is not None and not (isinstance(summary[key], float | int) and 0 <= summary[key] <= 1):
            yield f"summary.json has {key}={summary[key]}"
    if "accuracy" in summary:
        samples = _lines(folder / "samples.jsonl")
        if len(samples) != summary["problems"] * summary["samples_per_prompt"]:
            yield f"samples.jsonl has {len(samples)} lines"
        return
    tensors = load_file(folder / "adapter/adapter_model.safetensors")
    if not tensors or any(not tensor.isfinite().all() for tensor in tensors.values()):
        yield "the adapter is not finite"
    steps = [row["step"] for row in _lines(folder / "metrics.jsonl")] if summary["steps"] else []
    if steps != list(range(1, summary["steps"] + 1)):
        yield f"metrics.jsonl has the steps {steps} of {summary['steps']}"


def _lines(path: Path) -> list[Any]:
    return [strict_json(text) for text in path.read_text(encoding="utf-8").splitlines()]


def strict_json(text: str) -> Any:
    """JSON without NaN and Infinity; raises ValueError."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def failures(
    cases: Iterable[Case],
    root: Path,
    servers: Sequence[Server],
    also: Callable[[Result], Iterable[str]] = lambda _: (),
) -> str:
    """Run cases, one on each server at a time; what was wrong, each cause once, or "". `also`: more checks."""
    free: Queue[Server] = Queue()
    for server in servers:
        free.put(server)

    def one(numbered: tuple[int, Case]) -> list[tuple[Case, str]]:
        number, case = numbered
        server = free.get()
        try:
            result = run(case, root / str(number), server)
        finally:
            free.put(server)
        found = [*problems(result), *also(result)]
        shutil.rmtree(root / str(number), ignore_errors=True)
        return [(case, text) for text in found]

    times: Counter[str] = Counter()
    shown = []
    with ThreadPoolExecutor(len(servers)) as pool:
        for case, text in (pair for found in pool.map(one, enumerate(cases)) for pair in found):
            cause = re.sub(r"\d+", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "S", text))[:80]
            times[cause] += 1
            if times[cause] <= SHOWN:
                shown.append(f"{case}\n    {text}")
                print(shown[-1], flush=True)  # At once: many cases take hours.
    return "\n".join([*shown, *(f"{n} x {cause}" for cause, n in times.most_common())])
