"""A run's folder: config.yaml, metrics.jsonl (a line per step), warnings.jsonl (a line for each), eval_before.json,
resumes.json (where it went on), summary.json, masked_tokens.json, masked_by_mu.json, samples/step-N.jsonl, adapter/,
checkpoints/step-N/.

It appears on the disk only when everything that can be refused has been checked and loaded. Every file is complete or
not there, but for the last line of the two that grow. Imports no torch.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from dppo_cli.config.saved import sign
from dppo_cli.errors import RunError
from dppo_cli.training.files import finite, parse_json, read_json, remove, write_json, write_text
from dppo_cli.training.lock import LOCK, hold

METRICS = "metrics.jsonl"
WARNINGS = "warnings.jsonl"
BEFORE = "eval_before.json"
RESUMES = "resumes.json"
SUMMARY = "summary.json"
MASKED_TOKENS = "masked_tokens.json"
MASKED_BY_MU = "masked_by_mu.json"
SAMPLES = "samples"
NO_RUN = (LOCK, "job.json", ".job.json.tmp", ".config.yaml.tmp")
"""What may be in a free folder: it is of a sweep, or of a process that was killed before the run began."""
FILES = ("config.yaml", METRICS, WARNINGS, BEFORE, RESUMES, SUMMARY, MASKED_TOKENS, MASKED_BY_MU)
RESULTS = (*FILES, SAMPLES, "trackers", "adapter", "checkpoints")
TEMPORARY = (
    *(f".{name}.tmp" for name in RESULTS),
    ".nonfinite-*.tmp",
    f"{SAMPLES}/.step-*.tmp",
    "checkpoints/.step-*.tmp",
)
"""What a process that was killed may have left unfinished."""
MAX_DEPTH = 200
"""Of a path: Python makes folders by recursion."""
SPARE_BYTES = 64 * 2**20
"""Room for logs and metrics beside the adapters."""


def default_run_dir(parent: str) -> Path:
    """parent/<date>_<time>, with a counter where that second is taken."""
    base = Path(parent) / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    path, n = base, 1
    while path.exists():
        n += 1
        path = base.with_name(f"{base.name}_{n}")
    return path


def check_free(path: Path, key: str) -> None:
    """Raise RunError if `path`, which the user set as `key`, holds a run, is not a folder, or could not be written."""
    if len(path.parts) > MAX_DEPTH:
        raise RunError(f"{key}={path} is more than {MAX_DEPTH} folders deep; name another folder")
    missing = next((before for before in reversed(path.parents) if not before.exists()), path)
    if ".." in path.parts[len(missing.parts) :]:
        raise RunError(f"{key}={path} leads nowhere: there is no folder {missing}; name another folder")
    if path.exists() and not path.is_dir():
        raise RunError(f"{key}={path} is a file; name a new folder")
    if path.is_dir() and any(p.name not in NO_RUN for p in path.iterdir()):
        holds = {"config.yaml": "already holds a run", "multirun.yaml": "already holds a sweep"}
        what = next((text for name, text in holds.items() if (path / name).exists()), "is not empty")
        go_on = "add resume=auto to go on with it, " if key == "run_dir" and what in holds.values() else ""
        raise RunError(f"{key}={path} {what}; {go_on}name a new folder, or delete it first")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir():
        raise RunError(f"{key}={path} cannot be written: {parent} is a file; choose another {key}")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RunError(f"{key}={path} cannot be written: no permission in {parent}; choose another {key}")


def check_disk(path: Path, needed_bytes: int) -> None:
    """Raise RunError unless the disk under `path` has that much room."""
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed_bytes:
        raise RunError(
            f"{path} needs {needed_bytes / 2**20:.0f} MiB and the disk has {free / 2**20:.0f} MiB free; choose another "
            "place, or delete something"
        )


class RunFolder:
    """Writes a run, as a context. One process at a time has a run folder open.

    A run that ends before its first finished step leaves nothing, except what was in the folder before.
    """

    def __init__(
        self, path: Path, config_yaml: str, needed_bytes: int, *, named: bool = True, goes_on: bool = False
    ) -> None:
        """`named`: the user chose the path; if not, a path that is taken is replaced. `goes_on`: it holds a run."""
        if not named and path.exists():
            path = default_run_dir(str(path.parent))
        if not goes_on:
            check_free(path, "run_dir")
        check_disk(path, needed_bytes + SPARE_BYTES)
        self.path, self.config_yaml, self.named, self.goes_on = path, config_yaml, named, goes_on
        self.made_folder = False
        self.steps_logged = 0
        self.lock: IO[str] | None = None  # None: not open

    def __enter__(self) -> "RunFolder":
        try:
            with ExitStack() as undo:
                self._make()
                self.lock = undo.enter_context(hold(self.path))
                if not self.goes_on:
                    check_free(self.path, "run_dir")  # Another run may have come and ended since it was found free.
                undo.callback(self._remove)
                self._clean()
                write_text(self.path / "config.yaml", sign(self.config_yaml))
                undo.pop_all()
        except OSError as error:
            raise RunError(f"run_dir={self.path} cannot be written: {error.strerror or error}") from None
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        if kind is not None and self.steps_logged == 0:
            self._remove()
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def log(self, metrics: Mapping[str, Any]) -> None:
        """Append a line to metrics.jsonl. A number that is not finite, which JSON has not, is null there."""
        line = json.dumps(finite(metrics), allow_nan=False)
        with (self.path / METRICS).open("a", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            os.fsync(file.fileno())
        self.steps_logged += 1
        if self.steps_logged == 1:
            point_last(self.path)

    def warned(self, text: str) -> None:
        """Append a line to warnings.jsonl, for who looks at a run that goes on. Does nothing while it is not open.

        Never raises: it was said elsewhere, too, and a disk that is full ends the run at its next line of metrics.
        """
        if self.lock is not None:
            with suppress(OSError), (self.path / WARNINGS).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"warning": text}) + "\n")

    def warned_before(self, texts: Iterable[str]) -> None:
        """Have warnings.jsonl hold these alone: steps that run again warn again."""
        remove(self.path / WARNINGS)
        for text in texts:
            self.warned(text)

    def check_goes_on(self, steps: int) -> None:
        """Raise RunError, before anything is removed, unless the folder is that of a run that goes on after `steps`."""
        self.resumes()
        self._lines(steps)

    def cut(self, steps: int) -> None:
        """Keep the lines of the first `steps` steps in metrics.jsonl, and their samples: the others run again."""
        write_text(self.path / METRICS, "".join(f"{line}\n" for line in self._lines(steps)))
        self.remove_samples(step for step in sample_steps(self.path) if step > steps)
        self.steps_logged = steps
        if steps:
            point_last(self.path)

    def _lines(self, steps: int) -> list[str]:
        """The first lines of metrics.jsonl. Raises RunError unless they are those of the first `steps` steps."""
        path = self.path / METRICS
        # What follows the last line break is a line that was not written whole.
        try:
            lines = path.read_text(encoding="utf-8").split("\n")[:-1][:steps] if path.is_file() else []
        except ValueError:
            raise RunError(f"{path} is damaged: it is not UTF-8 text") from None
        if len(lines) < steps:
            raise RunError(f"{path} has {len(lines)} lines, but the checkpoint is of step {steps}: lines were lost")
        for step, line in enumerate(lines, 1):
            if _step_of(line) != step:
                raise RunError(f"{path} is damaged: line {step} is not that of step {step}")
        return lines

    def write_samples(self, step: int, lines: str) -> None:
        """Write samples/step-N.jsonl, complete or not at all."""
        path = samples_path(self.path, step)
        path.parent.mkdir(exist_ok=True)
        write_text(path, lines)

    def remove_samples(self, steps: Iterable[int]) -> None:
        """Remove the files of these steps, if they are there."""
        for step in steps:
            remove(samples_path(self.path, step))

    def write(self, name: str, content: Any) -> None:
        """Write a JSON file."""
        write_json(self.path / name, content)

    def resumed(self, step: int, changes: Mapping[str, Any]) -> None:
        """Note that the run goes on after `step`, with `changes` in its config: [then, now] by key.

        It has a file of its own, because a resume that finishes no step writes no checkpoint.
        """
        self.write(RESUMES, [*self.resumes(), {"step": step, "changes": dict(changes)}])

    def resumes(self) -> list[dict[str, Any]]:
        """All that were noted."""
        path = self.path / RESUMES
        if not path.is_file():
            return []
        try:
            found = read_json(path)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list):
            raise RunError(f"{path} is damaged; it only says where the run went on before: delete it")
        return found

    def save_adapter(self, write_adapter: Callable[[Path], None]) -> Path:
        """Write adapter/, complete or not at all. `write_adapter` fills a folder."""
        target, temporary = self.path / "adapter", self.path / ".adapter.tmp"
        remove(temporary)
        write_adapter(temporary)
        remove(target)
        temporary.replace(target)
        return target

    def _make(self) -> None:
        """Take the folder; a name that nobody chose changes until it is free."""
        while not self.goes_on:
            try:
                self.path.mkdir(parents=True)
                self.made_folder = True
                return
            except FileExistsError:
                if self.named:
                    return
                self.path = default_run_dir(str(self.path.parent))

    def _remove(self) -> None:
        """Remove all that this run has written."""
        if self.goes_on:
            return
        for pattern in (*RESULTS, *TEMPORARY):
            for path in self.path.glob(pattern):
                remove(path)
        with suppress(OSError):
            (self.path / LOCK).unlink()
            if self.made_folder:
                self.path.rmdir()

    def _clean(self) -> None:
        """Remove what a process that was killed left unfinished, and results that the run will write anew."""
        for pattern in TEMPORARY:
            for path in self.path.glob(pattern):
                remove(path)
        if self.goes_on:
            for name in (SUMMARY, MASKED_TOKENS, MASKED_BY_MU, "adapter"):
                remove(self.path / name)


def _step_of(line: str) -> Any:
    """Of a line of metrics.jsonl; None if it is none."""
    try:
        return parse_json(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def samples_path(run: Path, step: int) -> Path:
    return run / SAMPLES / f"step-{step}.jsonl"


def sample_steps(run: Path) -> list[int]:
    """The steps of which a run has samples, in order."""
    names = (re.fullmatch(r"step-([1-9][0-9]{0,17})\.jsonl", path.name) for path in (run / SAMPLES).glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def point_last(run: Path) -> None:
    """Make runs/last, in the working directory, point at `run`. Does nothing on a file system without links."""
    link = Path("runs/last")
    temporary = link.with_name(f".last-{os.getpid()}")
    try:
        temporary.parent.mkdir(exist_ok=True)
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(run.resolve(), link.parent.resolve()))
        temporary.replace(link)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
