"""What the commands that read a run share: where it is, its config, the adapter to take."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.errors import RunError
from dppo_cli.training.checkpoint import FOLDER, check, newest_good, step_of


@dataclass(frozen=True)
class TrainedRun:
    """`summary` is None for a run that was killed; `adapter` is then that of its newest checkpoint."""

    folder: Path
    adapter: Path
    config: TrainConfig
    summary: dict[str, Any] | None


def open_run(run: str, warn: Callable[[str], None]) -> TrainedRun:
    """A run, finished or not, or one of its checkpoints (RUN/checkpoints/step-N).

    Raises RunError, saying what is there, if it is neither.
    """
    path = Path(run)
    if not path.is_dir():
        near = [str(p) for p in sorted(path.parent.glob("*")) if p.is_dir()] if path.parent.is_dir() else []
        known = f"; there are: {', '.join(near[-5:])}" if near else "; train one with `dppo train`"
        raise RunError(f"run={run} points nowhere{known}")
    checkpoint = None
    if path.parent.name == FOLDER and step_of(path) is not None:
        check(path)
        checkpoint, path = path, path.parent.parent
    if not (path / "config.yaml").is_file():
        raise RunError(f"run={run} is not a run: it has no config.yaml")
    summary = None
    if checkpoint is None and (path / "summary.json").is_file():
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
        if not (path / "adapter/adapter_config.json").is_file():
            raise RunError(f"run={run} has lost its adapter: there is no adapter/adapter_config.json in it")
    elif checkpoint is None:
        checkpoint = newest_good(path, warn)
        if checkpoint is None:
            raise RunError(f"run={run} was not finished, and it has no complete checkpoint")
        warn(f"{run} was not finished; using its checkpoint of step {step_of(checkpoint)}")
    adapter = path / "adapter" if checkpoint is None else checkpoint / "adapter"
    return TrainedRun(path, adapter, read_run_config(path), summary)


def read_run_config(run: Path) -> TrainConfig:
    """The config a run was trained with."""
    node = OmegaConf.load(run / "config.yaml")
    assert isinstance(node, DictConfig)
    return build(TrainConfig, node)
