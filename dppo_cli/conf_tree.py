"""The YAML files that come with dppo: where they are, their groups and choices, their keys. Imports no torch."""

from pathlib import Path
from typing import Any

from dppo_cli.errors import ConfigError

PACKAGE = Path(__file__).parent


def config_dir() -> Path:
    """The YAML tree: beside the package in a checkout, inside it in an installed wheel."""
    return _data_dir("conf", "train.yaml")


def recipes_dir() -> Path:
    """The recipes, likewise."""
    return _data_dir("recipes", "README.md")


def groups() -> dict[str, list[str]]:
    """Config groups with their choices."""
    found = sorted(p for p in config_dir().iterdir() if p.is_dir())
    return {group.name: sorted(p.stem for p in group.glob("*.yaml")) for group in found}


def known_keys(command: str) -> list[str]:
    """Every dotted key that a command's config can have, whichever choices are made."""
    import yaml

    keys: dict[str, None] = {}

    def read(file: Path, group: str) -> None:
        text = file.read_text()
        node = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or {}
        defaults = node.pop("defaults", [])
        keys.update(dict.fromkeys(dotted_keys({group: node} if group and "@package _global_" not in text else node)))
        for entry in defaults:
            inner = next(iter(entry)) if isinstance(entry, dict) else ""
            if inner in groups() and not group:
                keys[inner] = None
                for choice in groups()[inner]:
                    read(config_dir() / inner / f"{choice}.yaml", inner)

    read(config_dir() / f"{command}.yaml", "")
    return list(keys)


def dotted_keys(config: dict[str, Any]) -> list[str]:
    """Every key of a config, inner ones too, without Hydra's own."""
    keys: list[str] = []

    def walk(prefix: str, value: Any) -> None:
        if prefix:
            keys.append(prefix)
        if isinstance(value, dict):
            for name, child in value.items():
                walk(f"{prefix}.{name}" if prefix else name, child)

    walk("", config)
    return [k for k in keys if not k.endswith("._target_") and k.split(".")[0] not in ("hydra", "recipes")]


def _data_dir(name: str, marker: str) -> Path:
    # Inside first: beside an installed package stand other people's folders.
    for place in (PACKAGE / name, PACKAGE.parent / name):
        if (place / marker).is_file():
            return place
    raise ConfigError(f"the folder {name} is missing from this installation of dppo; install it again")
