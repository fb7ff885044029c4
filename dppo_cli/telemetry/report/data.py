"""What a report is made of: a run as `dppo_cli.open_run` reads it, and what its checkpoints and resumes say.

A run may be going on, killed, or of another version: what is not there is left out, and `problems` says so in a line
each. Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dppo_cli.config.conf_tree import config_dir
from dppo_cli.errors import RunError
from dppo_cli.reading import Run, open_run
from dppo_cli.training.files import read_json
from dppo_cli.training.lock import is_held
from dppo_cli.training.run_folder import BEFORE, RESUMES

HELD_OUT = "held_out"
ABSENT = "–"
"""In place of the value of a key that only the run has, or only the default."""
Z = 1.959964
"""Half-width of a 95% interval, in standard errors."""


@dataclass(frozen=True)
class RunData:
    """A run that was read, and what else its folder says of it.

    `metrics`: those of `run` that are of a step. `before`: figures of the first evaluation by set; `seconds`: so far.
    `running`: a process has it open.
    """

    run: Run
    metrics: list[dict[str, Any]]
    problems: list[str]
    resumes: list[Any]
    warnings: list[str]
    before: dict[str, Any]
    seconds: float | None
    versions: dict[str, str]
    running: bool = False

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def config(self) -> dict[str, Any]:
        return self.run.config

    @property
    def summary(self) -> dict[str, Any] | None:
        return self.run.summary

    @property
    def steps(self) -> int:
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def planned_steps(self) -> int | None:
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def evaluations(self) -> dict[str, dict[str, Any]]:
        """By set: `before`, `after` and `difference`, each None where it is not known."""
        summary = self.summary or {}
        if found := section(summary, "evaluations"):
            keys = {"before": "accuracy", "after": "accuracy", "difference": "mean"}
            sets = {name: of for name, of in found.items() if isinstance(of, dict)}
            return {name: {k: _figures(of.get(k), value) for k, value in keys.items()} for name, of in sets.items()}
        if summary.get("eval_before") is not None:  # A run of a version that wrote no intervals.
            sides = {side: _measured(summary, side) for side in ("before", "after")}
            return {HELD_OUT: {**sides, "difference": None}}
        known = {name: _figures(of, "accuracy") for name, of in self.before.items()}
        return {name: {"before": of, "after": None, "difference": None} for name, of in known.items() if of}

    def delta(self, side: str) -> float | None:
        """The trust region's threshold for tokens with A > 0 (`high`) or A < 0 (`low`); None where it has another."""
        if str(section(self.config, "region").get("_target_", "")).endswith(".SequenceMean"):
            return None
        return number(section(self.config, "divergence").get(f"delta_{side}"))


def read_run(path: Path) -> RunData:
    """Raises RunError unless `path` is a run folder whose files can be read."""
    if not path.is_dir():
        raise RunError(f"run={path} is not a folder; name a run folder, such as runs/last")
    if (path / "multirun.yaml").is_file():
        raise RunError(f"run={path} is a sweep; use sweep={path}")
    if not (path / "config.yaml").is_file():
        raise RunError(f"run={path} is not a run: it has no config.yaml")
    run = open_run(path)
    problems = list(run.problems)
    metrics = [row for row in run.metrics if isinstance(row.get("step"), int)]
    if len(metrics) < len(run.metrics):
        problems.append(f"metrics.jsonl has lines of no step, which were left out: {len(run.metrics) - len(metrics)}")
    if not metrics:
        problems.append("no step is finished yet")
    state, versions = _checkpoint(path)
    told = run.summary or state
    # An older version left both in the checkpoints alone.
    warnings, before = run.warnings or told.get("warnings"), _json(path / BEFORE, dict) or state.get("before")
    return RunData(
        run=run,
        metrics=metrics,
        problems=problems,
        resumes=_json(path / RESUMES, list) or [],
        warnings=[str(text) for text in warnings] if isinstance(warnings, list) else [],
        before=before if isinstance(before, dict) else {},
        seconds=number(told.get("seconds")),
        versions=versions,
        running=is_held(path),
    )


def section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = config.get(name)
    return found if isinstance(found, dict) else {}


def number(value: Any) -> float | None:
    """A finite number; None for whatever is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def wilson(share: float, n: int) -> tuple[float, float]:
    """95% interval of a share of `n` independent trials (Wilson, 1927)."""
    share, n = min(1.0, max(0.0, share)), max(1, n)
    middle, scale = share + Z**2 / (2 * n), 1 + Z**2 / n
    half = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def differences(config: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Key, value and default of every key that is not as in conf/, but for the run's folder."""
    own, default = flat(config), flat(default_config())
    keys = [key for key in (*own, *(k for k in default if k not in own)) if key not in ("run_dir", "resume")]
    rows = [(key, own.get(key, ABSENT), default.get(key, ABSENT)) for key in keys]
    return [row for row in rows if row[1] != row[2]]


def default_config() -> dict[str, Any]:
    """The config of `dppo train` without any words."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_dir

    # A command runs inside Hydra, which then goes on with its own state.
    shared = GlobalHydra.instance()
    own, shared.hydra = shared.hydra, None
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            found: Any = OmegaConf.to_container(compose("train"))
    finally:
        shared.hydra = own
    return dict(found)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _figures(found: Any, value: str) -> dict[str, Any] | None:
    """An accuracy or a difference with its interval and number of problems, None where they are no numbers."""
    if not isinstance(found, dict) or (middle := number(found.get(value))) is None:
        return None
    interval = found.get("interval")
    ends = [number(end) for end in interval] if isinstance(interval, list) else []
    problems = number(found.get("problems"))
    whole = len(ends) == 2 and None not in ends
    return {value: middle, "interval": ends if whole else None, "problems": int(problems) if problems else None}


def _measured(summary: Mapping[str, Any], side: str) -> dict[str, Any] | None:
    accuracy, error = (number(summary.get(f"eval_{side}{more}")) for more in ("", "_error"))
    ends = None if accuracy is None or error is None else [accuracy - Z * error, accuracy + Z * error]
    found = {"accuracy": accuracy, "interval": ends and [max(0.0, ends[0]), min(1.0, ends[1])]}
    return _figures({**found, "problems": summary.get("eval_problems")}, "accuracy")


def _checkpoint(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What the newest checkpoint says of a run, finished or not, and the versions of the packages."""
    folders = [p for p in (path / "checkpoints").glob("step-*") if p.name[5:].isdecimal()]
    if not folders:
        return {}, {}
    newest = max(folders, key=lambda p: int(p.name[5:]))
    state, manifest = (_json(newest / name, dict) or {} for name in ("state.json", "manifest.json"))
    return state, {str(k): str(v) for k, v in section(manifest, "versions").items()}


def _json(path: Path, kind: type) -> Any:
    """None if there is no such file, or if it holds something else: a report does without."""
    try:
        found = read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, kind) else None
