"""What the commands that read a run share: where it is, its config, the adapter to take."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.config.saved import read_config
from dppo_cli.errors import RunError
from dppo_cli.policy.adapter import WEIGHTS
from dppo_cli.training.checkpoint import FOLDER, check, checkpoints, newest_good, read_checkpoint, sha256_of, step_of
from dppo_cli.training.files import as_number, read_json
from dppo_cli.training.state import CENTURY

CONFIG = "config.yaml"
SECRET_KEY = "_env"
"""How keys end whose values name secrets."""
EVALUATED = ("eval_before", "eval_before_error", "eval_after", "eval_after_error", "eval_problems")
"""Of a summary: None where it was not measured."""


@dataclass(frozen=True)
class TrainedRun:
    """`summary` is None for a run that was killed; `adapter` is then that of its newest checkpoint."""

    folder: Path
    adapter: Path
    summary: dict[str, Any] | None


def find_trained(run: str, warn: Callable[[str], None], which: str = "last") -> TrainedRun:
    """A run, finished or not, or one of its checkpoints (RUN/checkpoints/step-N).

    `which`: last, best (by evaluation) or step-N. Raises RunError, saying what is there, if there is none.
    """
    path = folder_of(run)
    if which != "last":
        run = str(_checkpoint(path, which))
    checkpoint = Path(run) if Path(run).parent.name == FOLDER and step_of(Path(run)) is not None else None
    summary = None
    if checkpoint is not None:
        check(checkpoint)
    elif (path / "summary.json").is_file():
        summary = read_summary(path)
        if not (path / "adapter/adapter_config.json").is_file():
            raise RunError(f"run={run} has lost its adapter: there is no adapter/adapter_config.json in it")
        weights = path / "adapter" / WEIGHTS
        if not weights.is_file():
            raise RunError(f"run={run} has lost its adapter: there is no adapter/{WEIGHTS} in it")
        if sha256_of(weights) != summary["adapter_sha256"]:
            raise RunError(f"{weights} is not what the run wrote (its SHA-256 in summary.json is another)")
    else:
        checkpoint = newest_good(path, warn)
        if checkpoint is None:
            raise RunError(f"run={run} was not finished, and it has no complete checkpoint")
        warn(f"{run} was not finished; using its checkpoint of step {step_of(checkpoint)}")
    return TrainedRun(path, path / "adapter" if checkpoint is None else checkpoint / "adapter", summary)


def _checkpoint(run: Path, which: str) -> Path:
    there = ", ".join(path.name for path in checkpoints(run)) or "none"
    if which == "best":
        newest = newest_good(run, warn=lambda _: None)
        best = None if newest is None else read_checkpoint(newest).plain.get("best")
        if not isinstance(best, list) or not best:
            raise RunError(f"checkpoint=best: {run} was not evaluated in between (eval.every); checkpoints: {there}")
        which = f"step-{best[0]}"
    path = run / FOLDER / which
    if step_of(path) is None or not path.is_dir():
        raise RunError(f"checkpoint={which} is not in {run}; checkpoints: last, best, {there}")
    return path


def folder_of(run: str) -> Path:
    """The folder of a run, or of the run that a checkpoint is of. Raises RunError if there is none."""
    path = Path(run)
    if not path.is_dir():
        near = [str(p) for p in sorted(path.parent.glob("*")) if p.is_dir()] if path.parent.is_dir() else []
        others = f" and {len(near) - 5} others" if len(near) > 5 else ""
        known = f"; there are: {', '.join(near[-5:])}{others}" if near else "; train one with `dppo train`"
        raise RunError(f"run={run} points nowhere{known}")
    if path.parent.name == FOLDER and step_of(path) is not None:
        path = path.parent.parent
    if not (path / CONFIG).is_file():
        raise RunError(f"run={run} is not a run: it has no {CONFIG}")
    return path


def run_config(folder: Path, own: DictConfig, trust: bool) -> DictConfig:
    """The config of a run, with the sections of `own`, which the user has set, in place of the run's.

    A section with a `_target_` takes the place of the run's; other keys are set one by one. Raises RunError if the run
    was made by somebody else and names code that the user did not, unless `trust`.
    """
    config, trusted = read_config(folder / CONFIG, trust)
    lacking = [f.name for f in fields(TrainConfig) if f.name not in config]
    if lacking:
        raise RunError(f"{folder / CONFIG} is not the config of a run of this version: it has no {lacking[0]}")
    for name, section in own.items():
        if section is not None:
            replaced = name not in config or not OmegaConf.is_config(section) or "_target_" in section
            OmegaConf.update(config, str(name), section, merge=not replaced, force_add=True)

    def refuse(key: str, value: str) -> None:
        # What the user has named on this command line is in `own`.
        typed = OmegaConf.select(own, key)
        typed = str(OmegaConf.to_container(typed)) if OmegaConf.is_config(typed) else typed
        if not trusted and typed != value:
            what = "a secret that would be sent" if key.endswith(SECRET_KEY) else "code that would run"
            raise RunError(
                f"{folder / CONFIG} was written by somebody else, or edited, and names {what}: {key}={value}. Read it, "
                "then add trust=true"
            )

    build(TrainConfig, config, refuse)
    return config


def key_of(word: str) -> str:
    """The key that a word of the command line sets."""
    return str(OverridesParser.create().parse_override(word).key_or_group)


def read_run_config(run: Path) -> TrainConfig:
    """The config that a run of this user's was trained with."""
    return build(TrainConfig, run_config(run, OmegaConf.create({}), trust=False))


def read_summary(run: Path) -> dict[str, Any]:
    """A run's summary.json. Raises RunError unless it holds what a run writes."""
    path = run / "summary.json"
    try:
        found: dict[str, Any] = read_json(path)
        numbers = [as_number(found[name]) for name in ("steps", "seconds", "peak_memory_gib")]
        numbers += [as_number(found[name]) for name in EVALUATED if found[name] is not None]
        right = min(numbers) >= 0 and found["seconds"] <= CENTURY
        right &= isinstance(found["interrupted"], bool) and isinstance(found["adapter_sha256"], str)
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        right = False
    if not right:
        raise RunError(f"{path} is damaged; without it the newest checkpoint is used: delete it")
    return found
