"""What of Hydra's own config may be set: launchers and sweepers. Imports Hydra only inside functions.

Much of it instantiates whatever it names (callbacks, handlers of logs), before dppo sees the config.
"""

from collections.abc import Sequence
from typing import Any

from dppo_cli.config.conf_tree import config_dir
from dppo_cli.errors import ConfigError

MAY_BE_SET = ("launcher", "sweeper", "mode")
"""Below `hydra`."""
OF_A_RUN = ("runtime", "overrides", "searchpath")
"""Different in every run, and of no consequence."""
OF_A_JOB = ("chdir", "env_set", "env_copy")
"""Below hydra.job, what has consequences."""
PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.", "optuna.samplers.")
"""Where the classes of launchers, sweepers and samplers are."""


def check_hydra(command: str, overrides: Sequence[str], searchpath: Sequence[str]) -> None:
    """Raise ConfigError if words, or YAML files of the user's --config-dir, set anything else of Hydra's config.

    Composes the config twice to compare, so it is for command lines that could.
    """
    for word in overrides:
        key, _, package = word.partition("=")[0].lstrip("+~").replace("/", ".").partition("@")
        for name in (key, package):
            part = name.removeprefix("hydra").removeprefix(".").partition(".")[0]
            if name.partition(".")[0] == "hydra" and part not in MAY_BE_SET:
                what = f"hydra.{part}" if part else "hydra"
                raise ConfigError(f"{what} cannot be set; of Hydra's own keys, {', '.join(MAY_BE_SET)} can")
    usual = hydra_config(command, [], [])
    for words in _compositions(overrides):
        for part, value in hydra_config(command, words, searchpath).items():
            if part == "job":
                value, same = ({name: of[name] for name in OF_A_JOB} for of in (value, usual[part]))
                if value != same:
                    raise ConfigError(f"--config-dir sets hydra.job; only {', '.join(MAY_BE_SET)} of hydra can be set")
            elif part in MAY_BE_SET:
                if isinstance(value, dict) and value.get("custom_search_space") is not None:
                    raise ConfigError("hydra.sweeper.custom_search_space names code that would run; leave it out")
                for target in _targets(value):
                    if not target.startswith(PLUGINS):
                        raise ConfigError(f"hydra.{part} names {target}, which is not a launcher or sweeper of Hydra's")
            elif part not in OF_A_RUN and value != usual.get(part):
                raise ConfigError(f"--config-dir sets hydra.{part}; only {', '.join(MAY_BE_SET)} of hydra can be set")


def _compositions(overrides: Sequence[str]) -> list[list[str]]:
    """The words that choose files or set Hydra's keys; of a sweep, every choice once."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import ValueType

    first: list[str] = []
    others: list[tuple[str, str]] = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key = override.key_or_group
        if "." in key and not key.startswith("hydra."):
            continue
        if not override.is_sweep_override():
            first.append(str(override.input_line))
        elif override.value_type is ValueType.GLOB_CHOICE_SWEEP:
            raise ConfigError(f"{override.input_line}: with --config-dir, name the choices")
        else:
            prefix = str(override.input_line).partition("=")[0]
            choices = [f"{prefix}={choice}" for choice in override.sweep_string_iterator()]
            first.append(choices[0])
            others += [(choices[0], choice) for choice in choices[1:]]
    return [first, *([new if word == old else word for word in first] for old, new in others)]


def hydra_config(command: str, overrides: Sequence[str], searchpath: Sequence[str]) -> dict[str, Any]:
    from hydra import compose
    from hydra.core.global_hydra import GlobalHydra
    from hydra.initialize import initialize_config_dir
    from omegaconf import OmegaConf

    GlobalHydra.instance().clear()
    path = f"hydra.searchpath=[{','.join(searchpath)}]"
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        node = compose(command, [*overrides, path], return_hydra_config=True)
    found: Any = OmegaConf.to_container(node.hydra, resolve=False)
    return dict(found)


def _targets(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [str(node["_target_"])] if "_target_" in node else []
        return own + [target for child in node.values() for target in _targets(child)]
    return [target for child in node for target in _targets(child)] if isinstance(node, list) else []
