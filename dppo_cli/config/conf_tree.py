"""The YAML files of dppo: their folder, groups, choices and keys. Imports no torch."""

from pathlib import Path
from typing import Any

from dppo_cli.errors import ConfigError

PACKAGE = Path(__file__).parent.parent


def config_dir() -> Path:
    """The folder of the YAML files: next to the package in a checkout, inside it in an installed wheel."""
    return _data_dir("conf", "train.yaml")


def recipes_dir() -> Path:
    """The folder of the recipes, found in the same way."""
    return _data_dir("recipes", "README.md")


def groups() -> dict[str, list[str]]:
    """All config groups and their choices."""
    found = sorted(p for p in config_dir().iterdir() if p.is_dir())
    return {group.name: sorted(p.stem for p in group.glob("*.yaml")) for group in found}


def groups_of(command: str) -> list[str]:
    """The groups that a command composes its config from."""
    return [name for file in _files_of(command) for name in _chosen(file) if name in groups()]


def _files_of(command: str) -> list[Path]:
    """A command's own file, and before it that of another command whose keys it has, too."""
    own = config_dir() / f"{command}.yaml"
    entries = _load(own.read_text())["defaults"]
    others = [entry for entry in entries if isinstance(entry, str) and entry not in ("_self_", "hydra_settings")]
    return [*(config_dir() / f"{name}.yaml" for name in others), own]


def _chosen(file: Path) -> list[str]:
    return [name for entry in _load(file.read_text())["defaults"] if isinstance(entry, dict) for name in entry]


def known_keys(command: str) -> list[str]:
    """Every dotted key that a command's config can have, for all choices of its groups."""
    keys: dict[str, None] = {}

    def read(file: Path, group: str) -> None:
        text = file.read_text()
        node = _load(text)
        node.pop("defaults", None)
        keys.update(dict.fromkeys(dotted_keys({group: node} if group and "@package _global_" not in text else node)))

    for file in _files_of(command):
        read(file, "")
    for group in groups_of(command):
        keys[group] = None
        for choice in groups()[group]:
            read(config_dir() / group / f"{choice}.yaml", group)
    return list(keys)


def of_another_choice(key: str) -> str | None:
    """What to choose to have a key, in words; None for a key that no choice of its group has."""
    group, having = key.partition(".")[0], _choices_with(key)
    if not having:
        return None
    if len(having) == 1:
        return f"{key} is a key of {group}={having[0]}, which is not chosen; add {group}={having[0]}"
    choices = f"{', '.join(having[:-1])} and {having[-1]}"
    return f"{key} is a key of {group}={choices}, of which none is chosen; add {group}={having[0]}, for example"


def _choices_with(key: str) -> list[str]:
    """The choices of a key's group that have it, their own or from the choices that they extend."""
    group = key.partition(".")[0]

    def has(choice: str) -> bool:
        text = (config_dir() / group / f"{choice}.yaml").read_text()
        node = _load(text)
        extended = [entry for entry in node.pop("defaults", []) if isinstance(entry, str) and entry != "_self_"]
        own = "@package _global_" not in text and key in dotted_keys({group: node})
        return own or any(has(entry) for entry in extended if entry in groups()[group])

    return [choice for choice in groups().get(group, []) if has(choice)]


def dotted_keys(config: dict[str, Any]) -> list[str]:
    """Every key of a config, nested keys included, without Hydra's own keys."""
    keys: list[str] = []

    def walk(prefix: str, value: Any) -> None:
        if prefix:
            keys.append(prefix)
        if isinstance(value, dict):
            for name, child in value.items():
                walk(f"{prefix}.{name}" if prefix else name, child)

    walk("", config)
    return [k for k in keys if not k.endswith("._target_") and k.split(".")[0] not in ("hydra", "recipes")]


def _load(text: str) -> dict[str, Any]:
    import yaml

    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}


def _data_dir(name: str, marker: str) -> Path:
    # The package's own folder comes first, because other packages' folders are next to an installed package.
    for place in (PACKAGE / name, PACKAGE.parent / name):
        if (place / marker).is_file():
            return place
    raise ConfigError(f"the folder {name} is missing from this installation of dppo; install it again")
