"""config.yaml of a run folder: how it is written, signed, and read back. Imports no torch.

A config can name code: classes, and the file of a reward function. The last line of a config.yaml is therefore a
signature, HMAC-SHA256 with a key in the user's config folder. It tells the runs that this user made on this machine
from those that came from somebody else, whose code runs only if the user says so.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.resolvers import oc

from dppo_cli.config.checks import check_no_secrets, escaped
from dppo_cli.errors import RunError

SIGNATURE = "# signature: "
KEY_BYTES = 32
MAX_BYTES = 2**18
MAX_DEPTH = 32
PLAIN = (
    "dppo_cli.algorithm.region.PerToken",
    "dppo_cli.algorithm.filters.KeepAll",
    "dppo_cli.environment.environment.NoEnvironment",
)
"""The choices of `region`, `filter` and `environment` that add nothing to the method."""
LATER: dict[str, Any] = {
    "hardware.processes": 1,
    "verdict": "lower",
    "region": {"_target_": PLAIN[0]},
    "filter": {"_target_": PLAIN[1]},
    "environment": {"_target_": PLAIN[2]},
}
"""Keys that a run's config did not always have, and what runs did before."""
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{")


def to_yaml(node: DictConfig) -> str:
    """A config as text, resolved, except for what comes from the environment: values of that go into no file."""
    check_no_secrets(OmegaConf.to_yaml(node))
    return OmegaConf.to_yaml(OmegaConf.create(_resolved(OmegaConf.to_container(node), node)))


def as_written(config_yaml: str, key: str, value: str) -> str:
    """`value` as a file may hold it: unresolved where the config takes `key` from the environment."""
    raw = OmegaConf.to_container(OmegaConf.create(config_yaml))
    for name in key.split("."):
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw if isinstance(raw, str) and INTERPOLATION.search(raw) else value


def sign(text: str) -> str:
    """The text with a last line that says who wrote it; without one where no key can be kept."""
    key = _key(make=True)
    return text if key is None else f"{text}{SIGNATURE}{_digest(key, text)}\n"


def is_ours(text: str) -> bool:
    """Whether this user signed it on this machine."""
    body, found, signature = text.rpartition(SIGNATURE)
    key = _key(make=False)
    if not found or key is None:
        return False
    return hmac.compare_digest(_digest(key, body).encode(), signature.strip().encode())


def read_config(path: Path, trust: bool = False) -> tuple[DictConfig, bool]:
    """A config.yaml, and whether the code that it names may run.

    Raises RunError if it cannot be read, or if it is somebody else's and asks for values of the environment.
    """
    try:
        if not path.is_file():  # A pipe would never end.
            raise RunError(f"{path} is not a file")
        if path.stat().st_size > MAX_BYTES:
            raise RunError(f"{path} has {path.stat().st_size} bytes; no config is as long")
        text = path.read_text(encoding="utf-8")
        _check_simple(path, text)
        node = OmegaConf.create(text)
    except RunError:
        raise
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise RunError(f"{path} is no YAML: {error.problem} in line {line}") from None
    except Exception as error:  # YAML and OmegaConf raise errors of many kinds, RecursionError among them.
        raise RunError(f"{path} cannot be read: {next(iter(str(error).splitlines()), type(error).__name__)}") from None
    if not isinstance(node, DictConfig) or not node:
        raise RunError(f"{path} is not a config: it holds no keys")
    for key, value in LATER.items():
        section, _, name = key.rpartition(".")
        parent = node.get(section) if section else node
        is_a_run = section or "objective" in node
        if is_a_run and isinstance(parent, DictConfig) and name not in parent:
            parent[name] = value
    trusted = trust or is_ours(text)
    if not trusted and (found := next(filter(INTERPOLATION.search, _texts(OmegaConf.to_container(node))), None)):
        raise RunError(
            f"{path} was not written by you, and has an interpolation, {found[:60]}; replace it by its value"
        )
    return node, trusted


def _texts(value: Any) -> Iterator[str]:
    """Every text in a config."""
    if isinstance(value, dict | list):
        for child in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _texts(child)
    elif isinstance(value, str):
        yield value


def _check_simple(path: Path, text: str) -> None:
    """Refuse what makes a short YAML text a huge object."""
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise RunError(f"{path} has an alias (*{event.anchor}); dppo writes none")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise RunError(f"{path} is nested more than {MAX_DEPTH} levels deep; no config is")


def _resolved(raw: Any, node: Any) -> Any:
    """`raw`, the unresolved content of `node`, with the values of its interpolations."""
    if not isinstance(raw, dict | list):
        return raw
    found = {}
    for key, child in raw.items() if isinstance(raw, dict) else enumerate(raw):
        if isinstance(child, str) and "${" in child:
            found[key] = _value(child, node, key)
        else:
            found[key] = _resolved(child, node[key]) if isinstance(child, dict | list) else child
    return found if isinstance(raw, dict) else list(found.values())


def _value(raw: str, node: Any, key: Any) -> Any:
    asked = []

    def env(name: str, default: Any = "_DEFAULT_MARKER_") -> Any:
        asked.append(name)
        return oc.env(name) if default == "_DEFAULT_MARKER_" else oc.env(name, default)

    OmegaConf.register_new_resolver("oc.env", env, replace=True)
    try:
        value = node[key]
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=True)
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)
    return raw if asked else escaped(value)


def _digest(key: bytes, text: str) -> str:
    return hmac.new(key, text.encode("utf-8"), hashlib.sha256).hexdigest()


def user_folder() -> Path:
    """Where the user's key is kept. The XDG specification says to ignore a relative XDG_CONFIG_HOME.

    Raises RuntimeError if there is no home folder.
    """
    named = Path(os.environ.get("XDG_CONFIG_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".config") / "dppo"


def _key(make: bool) -> bytes | None:
    """The user's key. None if there is none, or if none can be kept."""
    with suppress(OSError, RuntimeError):
        folder = user_folder()
        path = folder / "key"
        if make and not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / f".key-{os.getpid()}"
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
            # A link, because of two processes that make a key at once the second must take that of the first.
            try:
                path.hardlink_to(temporary)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                temporary.replace(path)
            temporary.unlink(missing_ok=True)
        key = path.read_bytes()
        return key if len(key) == KEY_BYTES else None
    return None
