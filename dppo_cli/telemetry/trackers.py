"""Experiment trackers, through Accelerate: what a run says goes to TensorBoard, Weights & Biases, MLflow or Trackio.

They are given numbers, evaluations, warnings and the config as config.yaml has it, in which what comes from the
environment is unresolved. A tracker that fails is named once and switched off (telemetry/listeners.py).
"""

import importlib.metadata
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from omegaconf import OmegaConf

from dppo_cli.config.checks import check_choice
from dppo_cli.config.saved import as_written
from dppo_cli.errors import ConfigError
from dppo_cli.types import EvalReport, RunInfo, StepReport

NONE = "none"
PACKAGES = {
    "tensorboard": (("tensorboard",), "pip install 'dppo[trackers]'"),
    "wandb": (("wandb",), "pip install wandb"),
    "mlflow": (("mlflow", "mlflow-skinny"), "pip install mlflow"),
    "trackio": (("trackio",), "pip install trackio"),
}
"""By tracker: the packages that have it, and what installs it."""
PROJECT = "dppo"
FOLDER = "trackers"
KNOWN_RUNS = "runs.json"
"""Under which id each tracker knows the run, so that a resume goes on with it."""
OWN_VARIABLES = ("WANDB_", "MLFLOW_", "TRACKIO_", "HF_")
"""Beginnings of the variables that trackers read by themselves; keys and addresses with passwords among them."""
SHORTEST_HIDDEN = 4
"""Characters of a variable's value that is looked for in messages: shorter ones are in any text."""


def chosen(tracker: Any) -> list[str]:
    """The names in `tracker=...`, one or a list. Raises ConfigError for what is none."""
    names = tracker if isinstance(tracker, list) else [tracker]
    for name in names:
        check_choice("tracker", name, (NONE, *PACKAGES))
    if len(names) > 1 and NONE in names:
        raise ConfigError(f"tracker={tracker} has {NONE!r} beside others; leave it out")
    return [name for name in dict.fromkeys(names) if name != NONE]


def check_installed(tracker: Any) -> None:
    """Raise ConfigError, with the command that installs it, for a tracker that is not installed."""
    for name in chosen(tracker):
        packages, install = PACKAGES[name]
        if not any(map(_is_installed, packages)):
            raise ConfigError(f"tracker={name} needs a package that is not installed: {install}")


class Tracker:
    """A listener that hands a run on to one tracker. Files that it writes here are below `trackers/` of the run."""

    def __init__(self, name: str, config_yaml: str) -> None:
        self.name, self.config_yaml = name, config_yaml
        self.named = set(re.findall(r"oc\.env:\s*['\"]?(\w+)", config_yaml))
        self.tracker: Any = None  # None: not started, failed, or finished
        self.run_dir: Path | None = None
        self.step = 0

    def started(self, run: RunInfo) -> None:
        self.run_dir, self.step = run.run_dir, run.step
        folder = (run.run_dir / FOLDER).resolve()
        written = Path(as_written(self.config_yaml, "run_dir", str(run.run_dir)))
        title = "/".join(written.parts[-2:])  # of a job of a sweep, the sweep and its number
        with self._guarded():
            folder.mkdir(exist_ok=True)
            known = _known_runs(folder)
            tracker, run_id = STARTS[self.name](folder, title, known.get(self.name), run.step)
            self.tracker = tracker
            if self.name not in known:
                self._log_config()
                (folder / KNOWN_RUNS).write_text(json.dumps({**known, self.name: run_id}) + "\n", encoding="utf-8")

    def evaluated(self, report: EvalReport) -> None:
        found = {"accuracy": report.accuracy, "standard_error": report.standard_error}
        self._log(flat({"eval": {report.name: found}}), report.step)

    def stepped(self, report: StepReport) -> None:
        self.step = report.metrics["step"]
        self._log(flat({key: value for key, value in report.metrics.items() if key != "step"}), self.step)

    def warned(self, text: str) -> None:
        if self.name in TAKE_TEXT:
            self._log({"warning": self._hidden(text)}, self.step)

    def finished(self, summary: Mapping[str, Any] | None) -> None:
        tracker, self.tracker = self.tracker, None
        if tracker is not None:
            with self._guarded():
                tracker.finish()
        if self.run_dir is not None and not (self.run_dir / "config.yaml").exists():
            # A run that ends before its first step leaves nothing.
            shutil.rmtree(self.run_dir / FOLDER, ignore_errors=True)

    def _log(self, values: Mapping[str, Any], step: int) -> None:
        if self.tracker is not None and values:
            with self._guarded():
                self.tracker.log(dict(values), step=step)

    def _log_config(self) -> None:
        raw = OmegaConf.to_container(OmegaConf.create(self.config_yaml))
        if self.name == "tensorboard":  # Accelerate would write it as a run of its own, at every start.
            self.tracker.log({"config": f"```yaml\n{self.config_yaml}\n```"}, step=0)
        else:
            self.tracker.store_init_configuration(_leaves(raw))

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Around whatever a tracker does. What it prints is not the run's output; what it raises gets its name."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except (Exception, SystemExit) as error:
            first = next(iter(str(error).strip().splitlines()), "")
            raise RuntimeError(self._hidden(f"tracker={self.name}: {type(error).__name__}: {first}")) from None

    def _hidden(self, text: str) -> str:
        """Without the values of variables that the config names, and of those that trackers read."""
        for name, value in os.environ.items():
            if len(value) >= SHORTEST_HIDDEN and (name in self.named or name.startswith(OWN_VARIABLES)):
                text = text.replace(value, f"${name}")
        return text


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, int | float]:
    """Numbers by their path. Example: `{"time": {"rollout": 1.5, "eval": None}}` -> `{"time/rollout": 1.5}`."""
    return {key: value for key, value in _leaves(values, prefix).items() if isinstance(value, int | float)}


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """What a mapping holds by its path; lists as text, since trackers take plain values."""
    if isinstance(value, Mapping):
        found: dict[str, Any] = {}
        for key, child in value.items():
            found |= _leaves(child, f"{prefix}/{key}" if prefix else str(key))
        return found
    return {prefix: value if isinstance(value, bool | int | float | str) or value is None else json.dumps(value)}


Started = tuple[Any, str]
"""A tracker, and the id under which it goes on with the run."""


def _start_tensorboard(folder: Path, title: str, known: str | None, step: int) -> Started:
    # Of events that an earlier process wrote, those of steps that run again are not shown.
    tracker = TensorBoardTracker("tensorboard", folder, purge_step=step + 1 if step else None)
    tracker.start()
    return tracker, "tensorboard"


def _start_wandb(folder: Path, title: str, known: str | None, step: int) -> Started:
    # Its record of the terminal is switched off: that would hold whatever a reward function prints.
    run_id = known or secrets.token_hex(4)
    tracker = WandBTracker(
        os.environ.get("WANDB_PROJECT", PROJECT),
        dir=str(folder),
        name=title,
        id=run_id,
        resume="allow",
        settings={"console": "off"},
    )
    tracker.start()
    return tracker, run_id


def _start_mlflow(folder: Path, title: str, known: str | None, step: int) -> Started:
    import mlflow

    artifacts = None
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        # Its store of plain files is refused by new versions.
        mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
        artifacts = (folder / "mlflow").as_uri()
    tracker = MLflowTracker(PROJECT, logging_dir=artifacts, run_id=known, run_name=title)
    tracker.start()
    return tracker, str(tracker.tracker.info.run_id)


def _start_trackio(folder: Path, title: str, known: str | None, step: int) -> Started:
    name = known or f"{title} {secrets.token_hex(4)}"  # It knows a run by its name.
    tracker = TrackioTracker(os.environ.get("TRACKIO_PROJECT", PROJECT), name=name, resume="allow", embed=False)
    tracker.start()
    return tracker, name


STARTS: dict[str, Callable[[Path, str, str | None, int], Started]] = {
    "tensorboard": _start_tensorboard,
    "wandb": _start_wandb,
    "mlflow": _start_mlflow,
    "trackio": _start_trackio,
}
TAKE_TEXT = ("tensorboard", "wandb")


def _known_runs(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / KNOWN_RUNS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _is_installed(package: str) -> bool:
    """By its record: a folder of its name, as trackers make them in the working folder, can be imported, too."""
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False
