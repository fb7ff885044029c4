"""The jobs of a sweep: what varied, what came out, and which differ in nothing but the seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dppo_cli.errors import DppoError, RunError
from dppo_cli.telemetry.report.data import HELD_OUT, RunData, flat, number, read_run, section
from dppo_cli.training.files import read_json

NEVER_VARIED = ("run_dir", "resume", "seed", "trust")
RECORD = "job.json"


@dataclass(frozen=True)
class Job:
    """`run` is None where the job left no run; `error` says why, if its record does. `swept`: what was typed for it."""

    name: str
    run: RunData | None
    error: str | None
    swept: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        return {} if self.run is None else flat(self.run.config)

    def accuracy(self, side: str) -> float | None:
        """Before or after training, of the held-out problems."""
        if self.run is None:
            return None
        measured = self.run.evaluations.get(HELD_OUT) or next(iter(self.run.evaluations.values()), {})
        return number(section(measured, side).get("accuracy"))


@dataclass(frozen=True)
class Setting:
    """Jobs that differ in their seed alone. `values`: of the keys that vary."""

    values: dict[str, Any]
    jobs: list[Job]

    @property
    def name(self) -> str:
        """Example: optim.lr=0.001 divergence=KL."""
        return " ".join(f"{key}={shown(value)}" for key, value in self.values.items()) or "the same config"

    def figures(self, side: str) -> list[float]:
        return [value for job in self.jobs if (value := job.accuracy(side)) is not None]

    @property
    def mean_after(self) -> float | None:
        return mean(found) if (found := self.figures("after")) else None


def shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith("dppo_cli."):
        return value.rpartition(".")[2]
    return "null" if value is None else str(value)


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation over seeds where there are several."""
    if not values:
        return "–"
    return f"{mean(values):.1%}" + (f" ± {100 * stdev(values):.1f}" if len(values) > 1 else "")


def read_jobs(folder: Path) -> list[Job]:
    """Raises RunError if there is not one run or record in the folder's folders."""
    if not folder.is_dir():
        raise RunError(f"sweep={folder} is not a folder; name the folder of a sweep's jobs")
    if (folder / "config.yaml").is_file():
        raise RunError(f"sweep={folder} is a run: use run={folder}")
    inside = [p for p in folder.iterdir() if (p / "config.yaml").is_file() or (p / RECORD).is_file()]
    if not inside:
        raise RunError(f"sweep={folder} holds no jobs: no folder in it has a config.yaml or a {RECORD}")
    return [_read_job(path) for path in sorted(inside, key=lambda p: (not p.name.isdigit(), p.name.zfill(9)))]


def _read_job(path: Path) -> Job:
    record: Any = {}
    if (path / RECORD).is_file():
        try:
            record = read_json(path / RECORD)
        except (OSError, ValueError):
            record = {"error": f"{RECORD} is damaged"}
    error = record.get("error") if isinstance(record, dict) else None
    swept = _words(record.get("overrides") if isinstance(record, dict) else None)
    if not (path / "config.yaml").is_file():
        return Job(path.name, None, str(error or "it left no run"), swept)
    try:
        run = read_run(path)
        # A job that was stopped may have gone on as a run by itself, of which the sweep has no record.
        finished = run.summary is not None and run.summary.get("interrupted") is False
        return Job(path.name, run, None if error is None or finished else str(error), swept)
    except DppoError as damage:
        return Job(path.name, None, str(damage), swept)


def _words(overrides: Any) -> dict[str, Any]:
    """Of key=value the value by the key's last part: `recipes/method=ppo` is {"method": "ppo"}."""
    words = [word for word in overrides or [] if isinstance(word, str) and "=" in word]
    return {key.rpartition("/")[2]: _number(value) for key, _, value in (word.partition("=") for word in words)}


def _number(text: str) -> Any:
    try:
        return float(text) if not text.lstrip("-").isdecimal() else int(text)
    except ValueError:
        return text


def settings(jobs: Sequence[Job]) -> list[Setting]:
    """The best mean accuracy first; without one last. By what was typed where every job has a record of it."""
    ran = [job for job in jobs if job.run is not None]
    configs = [job.swept if all(job.swept for job in ran) else job.config for job in ran]
    keys = varied(configs)
    found: dict[str, Setting] = {}
    for job, config in zip(ran, configs, strict=True):
        values = {key: config.get(key) for key in keys}
        found.setdefault(repr(values), Setting(values, [])).jobs.append(job)
    return sorted(found.values(), key=lambda s: (s.mean_after is None, -(s.mean_after or 0)))


def varied(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Keys that do not have one value in all jobs. The choices of groups (`_target_`) come first."""
    names = {key: None for config in configs for key in config if key.split(".")[0] not in NEVER_VARIED}
    keys = [key for key in names if len({repr(config.get(key)) for config in configs}) > 1]
    return sorted(keys, key=lambda key: not key.endswith("_target_"))
