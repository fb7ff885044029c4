"""Reads what runs leave, for notebooks and scripts: plain objects, and a pandas frame. Imports no torch.

    import dppo_cli
    run = dppo_cli.open_run("runs/last")
    run.config["steps"], run.metrics[-1]["reward"], run.samples(1)[0]["tokens"]

A run may still be going on, or have been killed. Nothing in its folder is run or changed.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from dppo_cli.config.saved import read_config
from dppo_cli.errors import RunError
from dppo_cli.training.run_folder import (
    MASKED_BY_MU,
    MASKED_TOKENS,
    METRICS,
    SUMMARY,
    WARNINGS,
    sample_steps,
    samples_path,
)

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]

CONFIG = "config.yaml"
JOB = "job.json"


@dataclass(frozen=True)
class Run:
    """A run as it was when it was opened; its samples are read when they are asked for.

    `config`: as in config.yaml, interpolations unresolved. `metrics`: a dict for each step. `summary`, `masked_tokens`,
    `masked_by_mu`: None for a run that was killed or is still going on. `sample_steps`: the steps that `samples` has.
    `warnings`: those of the run so far. `problems`: what was left out, in words.
    """

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    masked_tokens: list[dict[str, Any]] | None
    masked_by_mu: list[dict[str, Any]] | None
    sample_steps: list[int]
    warnings: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def samples(self, step: int) -> list[dict[str, Any]]:
        """The kept samples of a step, a dict each. Raises RunError, saying what there is, if there are none."""
        path = samples_path(self.path, step)
        if not path.is_file():
            there = sample_steps(self.path)
            if not there:
                raise RunError(f"{self.path} has no samples: samples.every was 0, or an older version trained it")
            raise RunError(f"{self.path} has no samples of step {step}, but of {', '.join(map(str, there))}")
        # Such a file is complete or not there.
        return [_object(path, line, f"line {n}") for n, line in enumerate(_lines(path), 1)]

    def frame(self) -> "pandas.DataFrame":
        """The metrics, a row for each step; nested ones are columns such as `time.rollout`.

        Raises RunError where pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise RunError("frame() needs the package pandas: pip install pandas") from None
        return pandas.DataFrame([_flat(row) for row in self.metrics])


@dataclass(frozen=True)
class Job:
    """A job of a sweep. `overrides`: what was set in it; None if it has not ended. `error`: of one that failed.

    `run` is None if it failed before its first step.
    """

    number: int
    overrides: list[str] | None
    error: str | None
    run: Run | None


def open_run(path: str | Path) -> Run:
    """Read a run folder, such as runs/last. Raises RunError if it is none, or if a file in it is damaged."""
    folder = _folder(path)
    if not (folder / CONFIG).is_file():
        if _jobs(folder):
            raise RunError(f"{folder} is a sweep; dppo_cli.open_sweep({str(path)!r}) reads all of its runs")
        raise RunError(f"{folder} is not a run: it has no {CONFIG}")
    node, _ = read_config(folder / CONFIG, trust=True)  # Nothing is built of it.
    config: Any = OmegaConf.to_container(node)
    problems: list[str] = []
    summary = _json(folder / SUMMARY, dict)
    so_far = _warnings(folder / WARNINGS, problems) if summary is None else summary.get("warnings")
    return Run(
        path=folder,
        config=config,
        summary=summary,
        metrics=_metrics(folder / METRICS, problems),
        masked_tokens=_json(folder / MASKED_TOKENS, list),
        masked_by_mu=_json(folder / MASKED_BY_MU, list),
        sample_steps=sample_steps(folder),
        warnings=[str(text) for text in so_far] if isinstance(so_far, list) else [],
        problems=problems,
    )


def open_sweep(path: str | Path) -> list[Job]:
    """Read the runs of a sweep (`dppo train -m`), by job number. Raises RunError if it is none, or is damaged."""
    folder = _folder(path)
    jobs = _jobs(folder)
    if (folder / CONFIG).is_file():
        raise RunError(f"{folder} is a run; dppo_cli.open_run({str(path)!r}) reads it")
    if not jobs:
        raise RunError(f"{folder} is not a sweep: there is no run in a folder of it")
    return [_job(number, jobs[number]) for number in sorted(jobs)]


def _folder(path: str | Path) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise RunError(f"{folder} is not there" if not folder.exists() else f"{folder} is not a folder")
    return folder


def _jobs(folder: Path) -> dict[int, Path]:
    """The folders of a sweep's jobs by their number, which is their name."""
    numbered = {int(p.name): p for p in folder.iterdir() if p.name.isascii() and p.name.isdecimal() and p.is_dir()}
    return {number: p for number, p in numbered.items() if (p / JOB).is_file() or (p / CONFIG).is_file()}


def _job(number: int, folder: Path) -> Job:
    record = _json(folder / JOB, dict) or {}
    run = open_run(folder) if (folder / CONFIG).is_file() else None
    return Job(number, record.get("overrides"), record.get("error"), run)


def _metrics(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    *lines, rest = _text(path).split("\n")
    if rest:
        problems.append(f"{path}: the last line is not complete and was left out; the run was killed, or still writes")
    return [_object(path, line, f"line {n}") for n, line in enumerate(lines, 1)]


def _warnings(path: Path, problems: list[str]) -> list[str]:
    """What follows the last line break is being written. A line may be damaged where the disk was full."""
    found = []
    for n, line in enumerate(_text(path).split("\n")[:-1] if path.is_file() else [], 1):
        try:
            found.append(str(_object(path, line, f"line {n}").get("warning")))
        except RunError as error:
            problems.append(f"{error}; it was left out")
    return found


def _lines(path: Path) -> list[str]:
    return _text(path).removesuffix("\n").split("\n")


def _json(path: Path, kind: type) -> Any:
    """What a JSON file holds; None if it is not there."""
    return _parsed(path, _text(path), kind, "it") if path.is_file() else None


def _object(path: Path, text: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = _parsed(path, text, dict, where)
    return found


def _parsed(path: Path, text: str, kind: type, where: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, kind):
        raise RunError(f"{path} is damaged: {where} is not a JSON {'object' if kind is dict else 'list'}")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise RunError(f"{path} is damaged: it is not UTF-8 text") from None


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in row.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found
