"""One-line error messages for mistakes in a command line, with the nearest valid word.

Imports no torch, and Hydra only inside functions, so that an answer is fast.
"""

import difflib
import re
from collections.abc import Sequence
from typing import Any

from dppo_cli.cli.hydra_keys import MAY_BE_SET, hydra_config
from dppo_cli.config.checks import did_you_mean
from dppo_cli.config.conf_tree import (
    config_dir,
    dotted_keys,
    groups,
    groups_of,
    known_keys,
    of_another_choice,
    recipes_dir,
)
from dppo_cli.errors import ConfigError

MEMBERS = {"eval_sets.": "data", "data.members.": "data", "filter.members.": "filter", "reward.members.": "reward"}
"""Mappings from names that the user gives to choices of a group."""
OF_SEVERAL = {"data": "mixture", "filter": "all_of", "reward": "mixture"}
"""The choice of a group that has members."""
OF_OTHERS = {
    "learning_rate": "optim.lr",
    "max_steps": "steps",
    "total_training_steps": "steps",
    "num_iterations": "batch.epochs",
    "ppo_epochs": "batch.epochs",
    "batch_size": "batch.prompts_per_step",
    "train_batch_size": "batch.prompts_per_step",
    "ppo_mini_batch_size": "batch.prompts_per_update",
    "per_device_train_batch_size": "hardware.tokens_per_micro_batch",
    "micro_batch_size": "hardware.tokens_per_micro_batch",
    "num_generations": "batch.samples_per_prompt",
    "group_size": "batch.samples_per_prompt",
    "max_completion_length": "sampling.max_new_tokens",
    "max_response_length": "sampling.max_new_tokens",
    "max_tokens": "sampling.max_new_tokens",
    "temperature": "sampling.temperature",
    "beta": "kl_to_reference",
    "kl": "kl_to_reference",
    "kl_coef": "kl_to_reference",
    "delta": "divergence.delta_low",
    "epsilon": "objective.eps_low",
    "rank": "adapter.r",
    "lora_r": "adapter.r",
    "lora_rank": "adapter.r",
    "lora_alpha": "adapter.alpha",
    "lora_dropout": "adapter.dropout",
    "model.name": "model.path",
    "model_name_or_path": "model.path",
    "output_dir": "run_dir",
    "save_steps": "checkpoint.every",
    "eval_steps": "eval.every",
    "num_processes": "hardware.processes",
    "tools": "environment",
    "env": "environment",
}
"""By names that other tools have: keys here."""
MOST_MEANT = 5
"""Keys of one name that are all shown."""
FREE = ("prompt.template_kwargs.", "data.options.", "data.weights.", "reward.weights.", *MEMBERS)
"""Keys below have names that the user gives, so none is unknown."""


def member(key: str, value: str) -> str | None:
    """The group of a word that names a member of a mapping: `eval_sets.NAME=CHOICE`; None for any other.

    Raises ConfigError for a choice that the group does not have.
    """
    for prefix, group in MEMBERS.items():
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or "." in name:
            continue
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"{key}={value}: a name has letters, digits and _ only, and no digit at its start")
        for choice in value.split(","):
            if choice not in groups()[group]:
                raise ConfigError(f"{key}={value}: {_no_such_choice(group, choice)}")
        return group
    return None


def check_words(command: str, overrides: Sequence[str]) -> None:
    """Raise ConfigError for a key that no choice of any group has, or for a choice that its group does not have.

    This runs before Hydra, because importing Hydra and composing the config take time. Only plain `key=word` is
    checked; Hydra handles all other syntax.
    """
    plain = [m.groups() for word in overrides if (m := re.match(r"([A-Za-z_][\w.]*)=(.*)", word))]
    words = [w for w in plain if w[0] != "recipe" and not w[0].startswith("hydra.") and not w[0].endswith("._target_")]
    known, choosable = (known_keys(command), groups_of(command)) if words else ([], [])
    for key, value in words:
        if key not in known and not key.startswith(FREE):
            raise ConfigError(_no_such_key(key, known))
        if key in choosable and (value.startswith("[") or not value):
            several = f"; for several: {key}={OF_SEVERAL[key]} {key}.members.NAME=CHOICE" if key in OF_SEVERAL else ""
            raise ConfigError(f"{key}={value} is an invalid value: {key} takes one choice{several}")
        for choice in value.split(",") if key in choosable else []:
            if re.fullmatch(r"[A-Za-z_]\w*", choice) and choice != "null" and choice not in groups()[key]:
                raise ConfigError(_no_such_choice(key, choice))


def explain(error: Exception, command: str, overrides: Sequence[str]) -> str:
    """Hydra's error message in one line, with the nearest valid word."""
    from hydra.errors import HydraException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    message = str(error)
    first = next(iter(message.strip().splitlines()), type(error).__name__).rstrip(".")
    if not message.strip() or not isinstance(error, HydraException | OmegaConfBaseException | ValueError):
        return f"Hydra cannot make a config of these words: {' '.join(overrides)} ({first})"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}; write key=value, with quotes around spaces, commas and brackets"
    if message.startswith("Exceeds the limit"):  # of digits that Python reads
        keys = [word.partition("=")[0] for word in overrides if re.search(r"\d{4301}", word)]
        return f"{', '.join(keys) or 'a word'} has a number with more than 4,300 digits"
    if match := re.search(r"Could not override '([^']+)'", message):
        key = match.group(1)
        if says := of_another_choice(key):
            group, run = key.partition(".")[0], next((word for word in overrides if word.startswith("resume=")), None)
            return says if run in (None, "resume=auto") else f"with {run}, type the run's own {group}=... beside {key}"
        return _no_such_key(key, (_hydra_keys if key.startswith("hydra.") else _composed_keys)(command, overrides))
    if message.startswith("Error merging override ") and error.__cause__ is not None:
        return f"{first.removeprefix('Error merging override ')}: {str(error.__cause__).partition(chr(10))[0]}"
    if match := re.search(r"Could not find '(hydra/[^']+)/([^'/]+)'", message):
        group, choice = match.groups()
        return f"{group}={choice} is not installed; for joblib, submitit_local and optuna: pip install 'dppo[sweeps]'"
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", message):
        return _no_such_choice(*match.groups())
    if "override must be a string" in message:
        words = [word.split("=", 1) for word in overrides if word.partition("=")[0] in groups()]
        for group, choice in words:
            if choice not in groups()[group]:
                return _no_such_choice(group, choice)
    if "ambiguous value" in message.lower():
        return f"{first.split(': ', 1)[-1]}; to run every value, add -m"
    return first


def _composed_keys(command: str, overrides: Sequence[str]) -> list[str]:
    """The keys of the config, given the choices on the command line."""
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from hydra.initialize import initialize_config_dir
    from omegaconf import OmegaConf

    choices = [word for word in overrides if word.partition("=")[0] in groups() and "," not in word]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        try:
            composed: Any = OmegaConf.to_container(compose(command, choices), resolve=False)
        except HydraException:  # The choice exists only in the user's --config-dir.
            return known_keys(command)
    return dotted_keys(composed)


def _hydra_keys(command: str, overrides: Sequence[str]) -> list[str]:
    """The keys of the launcher and the sweeper that are chosen."""
    choices = [word for word in overrides if word.startswith(("hydra/launcher=", "hydra/sweeper="))]
    composed = hydra_config(command, choices, [])
    return [f"hydra.{key}" for key in dotted_keys({part: composed[part] for part in MAY_BE_SET})]


def _no_such_choice(group: str, choice: str) -> str:
    # A recipe may have groups of its own, below recipes/.
    of_recipes = [path.stem for path in (recipes_dir().parent / group).glob("*.yaml")]
    return f"there is no {group}={choice}{did_you_mean(choice, groups().get(group, of_recipes))}"


def _no_such_key(key: str, keys: Sequence[str]) -> str:
    """`keys`: all valid keys."""
    if key in keys:
        below = [k for k in keys if k.startswith(f"{key}.")]
        return f"{key} cannot be set as a whole here; set {', '.join(below or [key])}"
    parent, meant = key.rpartition(".")[0], _meant(key, keys)
    siblings = _below(parent, keys)
    if not siblings:
        parent, siblings = "", _below("", keys)
    hint = f"; did you mean {_either(meant)}?" if meant else "."
    return f"there is no key {key}{hint} Choices{f' in {parent}' if parent else ''}: {', '.join(siblings)}"


def _either(words: Sequence[str]) -> str:
    return " or ".join([*filter(None, [", ".join(words[:-1])]), words[-1]])


def _below(parent: str, keys: Sequence[str]) -> list[str]:
    """Names of the keys directly below one."""
    prefix = f"{parent}." if parent else ""
    return sorted({k.removeprefix(prefix).split(".")[0] for k in keys if k.startswith(prefix)})


def _meant(key: str, keys: Sequence[str]) -> list[str]:
    """Keys that may be meant: that which other tools call so, near names in its section, this name in others."""
    parent, _, name = key.rpartition(".")
    for known in (key, name):
        if OF_OTHERS.get(known) in keys:
            return [OF_OTHERS[known]]
    beside = _below(parent, keys) if parent else []
    if close := difflib.get_close_matches(name, beside, n=1, cutoff=0.6):
        return [f"{parent}.{close[0]}"]
    elsewhere = [k for k in keys if k.rpartition(".")[2] == name]
    if 0 < len(elsewhere) <= MOST_MEANT:
        return sorted(elsewhere, key=lambda k: (k.startswith("eval"), k))
    return [] if beside else difflib.get_close_matches(key, keys, n=1, cutoff=0.6)
