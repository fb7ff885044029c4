"""`dppo train resume=... adapter.path=...`: the config of a run that goes on, or of one that starts from an adapter.

`resume=RUN` takes the run's own config. What is set besides may change how the run goes on, not what a step computes.
`run_dir=FOLDER resume=auto` starts a run, or goes on with the one in FOLDER if it is of the same config.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.commands.trained import CONFIG, key_of, read_summary, run_config
from dppo_cli.config.build import absolute, raw_value
from dppo_cli.config.saved import LATER, read_config
from dppo_cli.errors import ConfigError, RunError
from dppo_cli.policy.adapter import SETTINGS, read_settings
from dppo_cli.training.checkpoint import FOLDER, check, installed, newest_good, step_of
from dppo_cli.training.evaluation import HELD_OUT, fingerprint
from dppo_cli.training.run_folder import SAMPLES, check_free
from dppo_cli.training.state import Snapshot
from dppo_cli.types import Prompt

OF_THE_COMMAND = ("resume", "run_dir", "trust")
"""Keys that say where and whether to go on."""
OF_SERVERS = ("url", "api_key_env", "adapters", "concurrent_prompts", "timeout", "patience")
"""Keys of rollout=vllm that say where servers are, and how they are asked."""
MAY_CHANGE = (
    *("steps", "checkpoint", "stop", "samples", "tracker", "console", "hardware.processes", *OF_THE_COMMAND),
    *(f"rollout.{key}" for key in OF_SERVERS),
)
"""Keys and sections that do not change what a step computes, but for rounding (`steps` only where the learning rate
does not depend on it)."""


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build: `node` as composed, or that of the run which `resume` names, with what was `typed` besides.

    Raises ConfigError, naming the key, for what would make it another run, RunError if there is no run, ModelError for
    an adapter to start from that cannot be used.
    """
    run = node.get("resume")
    if run == "auto" and node.get("run_dir") is None:
        raise ConfigError("resume=auto needs the folder to start or go on in; add run_dir=...")
    if run is None or run == "auto":
        earlier = Path(str(node.get("run_dir"))) / CONFIG
        # Only compared: it need not be trusted.
        saved = read_config(earlier, trust=True)[0] if run == "auto" and earlier.is_file() else None
        _take_over_adapter(node, typed, saved)
        return node
    if not (Path(str(run)) / CONFIG).is_file():
        raise RunError(f"resume={run} is not a run: it has no config.yaml; runs/last is the newest run")
    saved = run_config(Path(str(run)), OmegaConf.create({}), bool(node.trust))
    folder = node.get("run_dir")
    if folder is not None and os.path.realpath(str(folder)) != os.path.realpath(str(run)):
        raise ConfigError(f"resume={run} goes on in its own folder; leave run_dir={folder} out")
    _take_over_adapter(node, typed, saved)
    for word in typed:
        key = key_of(word)
        if key.startswith("recipes/"):
            raise ConfigError(f"resume={run} goes on with the run's own config; leave recipe out")
        for leaf, new in _flat(raw_value(node, key), key).items():
            old = raw_value(saved, leaf)
            # The run's own config names files by absolute paths.
            if leaf not in OF_THE_COMMAND and old not in (new, absolute(new)):
                _check_may_change(str(run), leaf, old, new)
                OmegaConf.update(saved, leaf, new)
        _check_nothing_is_left_out(str(run), _flat(raw_value(saved, key), key), _flat(raw_value(node, key), key))
    saved.run_dir, saved.resume = _name_of(Path(str(run))), str(run)
    return saved


def _take_over_adapter(node: DictConfig, typed: Sequence[str], saved: DictConfig | None) -> None:
    """Set in `node` what the adapter in adapter.path is. What was `typed` must agree with it; the YAML need not.

    `saved`: the config of the run that goes on. It holds this already, and the folder may be gone.
    """
    path = OmegaConf.select(node, "adapter.path")
    if path is None:
        return
    # As a run's config names it, whether it is still there or not. Path.resolve raises for a link to itself.
    folder = node.adapter.path = os.path.realpath(str(path))
    composed: Any = OmegaConf.to_container(node.adapter, resolve=True)
    if saved is not None and OmegaConf.select(saved, "adapter.path") == folder:
        known: Any = OmegaConf.to_container(saved.adapter, resolve=True)
        found = {name: known.get(name) for name in SETTINGS}
    else:
        found = read_settings(Path(folder))
    for word in typed:
        section, _, key = key_of(word).partition(".")
        # A choice of the group says which kind it is to be.
        names = (key.partition(".")[0],) if key else ("use_dora", "use_rslora")
        for name in names if section == "adapter" else ():
            if name in SETTINGS and _unordered(composed[name]) != _unordered(found[name]):
                mine, theirs = (f"{name}={json.dumps(values[name])}" for values in (composed, found))
                raise ConfigError(
                    f"{word} means {mine}, but the adapter in {folder}, which training goes on with, has {theirs}; "
                    f"leave {word} out"
                )
    for name, value in found.items():
        node.adapter[name] = value


def _unordered(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, list) else value


def _name_of(run: Path) -> str:
    """The folder itself, which runs/last points to, relative to the working directory if it is in there."""
    path, here = run.resolve(), Path.cwd().resolve()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def changes(run: Path, config_yaml: str) -> dict[str, Any]:
    """What is set differently now than in the run in a folder, by dotted key: [then, now].

    Raises ConfigError, naming the key, if a difference changes what a step computes.
    """
    # Only compared, and with its interpolations as they are: it need not be trusted.
    saved, _ = read_config(run / CONFIG, trust=True)
    now = OmegaConf.create(config_yaml)
    old, new = _flat(saved, resolve=False), _flat(now, resolve=False)
    found = {}
    for key in dict.fromkeys([*old, *new]):
        if old.get(key) == new.get(key) or key in OF_THE_COMMAND:
            continue
        _check_may_change(str(run), key, old.get(key), new.get(key))
        if key == "steps" and now.optim.schedule == "cosine":
            raise ConfigError(
                f"steps={new[key]} cannot replace the run's steps={old[key]}: under optim.schedule=cosine every step's "
                "learning rate depends on it; start a new run"
            )
        found[key] = [old.get(key), new.get(key)]
    return found


@dataclass(frozen=True)
class Earlier:
    """What there is of a run. `summary`: it has finished, and nothing is left to do."""

    goes_on: bool = False
    checkpoint: Path | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] | None = None


def find_earlier(run: Path, config: TrainConfig, config_yaml: str, warn: Callable[[str], None]) -> Earlier:
    """What there is to go on with in a run folder. Raises RunError or ConfigError for a folder that cannot be used."""
    if config.resume is None or not (run / CONFIG).is_file():
        check_free(run, "run_dir")
        return Earlier()
    changed = changes(run, config_yaml)
    summary = None
    # A damaged one is written anew at the end.
    with suppress(RunError):
        summary = read_summary(run)
    if summary is not None and not summary["interrupted"] and summary["steps"] >= config.steps:
        if config.resume != "auto":
            raise RunError(f"resume={run}: all {summary['steps']} steps of this run are done; to go on, raise steps")
        print(f"{run}: all {summary['steps']} steps are done")
        return Earlier(goes_on=True, summary=summary)
    for name in (FOLDER, SAMPLES):
        if (run / name).is_symlink():
            raise RunError(f"{run / name} is a link, and a run writes into its own folder alone; put the folder there")
    checkpoint = newest_good(run, warn)
    if checkpoint is None and (run / "summary.json").exists():
        raise RunError(
            f"{run} has results but no complete checkpoint to go on from; nothing is changed. To train its adapter "
            f"further, start another run with adapter.path={run}/adapter"
        )
    if checkpoint is None:
        warn("the run has no complete checkpoint; it starts anew")
        return Earlier(goes_on=True, changes=changed)
    manifest = check(checkpoint)
    if manifest["config_sha256"] != method_hash(config_yaml):
        raise RunError(f"{run}/config.yaml was changed after {checkpoint} was written; a resume would be another run")
    step = step_of(checkpoint) or 0
    if step > config.steps:
        raise ConfigError(f"steps={config.steps} is less than the {step} steps that the run has done")
    for name, then in manifest["versions"].items():
        if installed().get(name) != then:
            warn(f"the run was made with {name} {then}, and this is {installed().get(name)}: results may differ")
    return Earlier(goes_on=True, checkpoint=checkpoint, changes=changed)


def check_problems(
    checkpoint: Path,
    saved: Snapshot,
    train: Sequence[Prompt],
    sets: Mapping[str, Sequence[Prompt]],
    warn: Callable[[str], None],
) -> None:
    """Raise RunError if `sets` are not the problems that the run was first evaluated on; warn if `train` has changed.

    Of a run of a version that kept no fingerprints, only the number of problems is known.
    """
    for name, measured in (saved.plain["before"] or {}).items():
        problems = sets.get(name, [])
        then, now = len(measured["rates"]), len(problems)
        if then != now or measured.get("fingerprint") not in (None, fingerprint(problems)):
            which = "held-out problems of data" if name == HELD_OUT else f"problems of eval_sets.{name}"
            what = f"{then} then, {now} now" if then != now else "a prompt, an answer or the order has changed"
            raise RunError(
                f"the {which} are not those of the run's first evaluation ({what}), so the last one could not be "
                "compared with it. Restore the data to go on, or train the adapter further in a new run: "
                f"adapter.path={checkpoint}/adapter"
            )
    if saved.plain.get("fingerprint") not in (None, fingerprint(train)):
        warn(
            f"the training problems have changed since step {saved.plain['step']}; the run goes on with the present "
            "ones, so it equals no run that had one data set from the start"
        )


def method_hash(config_yaml: str) -> str:
    """SHA-256 of the part of a config that says what a step computes.

    Keys that came later count only where they say something else than runs did before.
    """
    flat, later = _flat(OmegaConf.create(config_yaml)), _flat(LATER)
    method = {
        key: value for key, value in flat.items() if not _may_change(key) and not (key in later and later[key] == value)
    }
    return sha256(json.dumps(method, sort_keys=True).encode()).hexdigest()


def _may_change(key: str) -> bool:
    return key in MAY_CHANGE or key.partition(".")[0] in MAY_CHANGE


def _check_may_change(run: str, key: str, old: Any, new: Any) -> None:
    if not _may_change(key):
        raise ConfigError(
            f"{key}={new} cannot replace {key}={old} of the run in {run}: it would be another run. Leave it out to go "
            "on, or start a new run"
        )


def _check_nothing_is_left_out(run: str, of_run: Mapping[str, Any], typed: Mapping[str, Any]) -> None:
    """Of the keys below one that was typed, those that the run has and the words do not: a member, for one."""
    if lacking := [key for key in of_run if key not in typed and not _may_change(key)]:
        key = lacking[0]
        raise ConfigError(
            f"{key}={of_run[key]} of the run in {run} is not among what was typed: it would be another run. Type none "
            "of it to go on, or start a new run"
        )


def _flat(node: Any, prefix: str = "", *, resolve: bool = True) -> dict[str, Any]:
    """Dotted keys and values; lists are values."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=resolve)
    if not isinstance(node, dict):
        return {prefix: node}
    found: dict[str, Any] = {}
    for name in node:
        found |= _flat(node[name], ".".join(filter(None, (prefix, str(name)))))
    return found
