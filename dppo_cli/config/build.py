"""From composed YAML to frozen, checked dataclasses. Imports no torch by itself.

After `build()` the program sees dataclasses, never OmegaConf. The type hints of a class say what its
keys may hold. A mapping with `_target_`, at any depth and in lists, becomes that class; a mapping for a field that is
hinted as a dataclass becomes that dataclass. OmegaConf checks the types of values, each class's `__post_init__` ranges
and combinations. YAML is the only home of defaults.
"""

import importlib
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, make_dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dppo_cli.config.checks import did_you_mean, escaped
from dppo_cli.config.conf_tree import of_another_choice
from dppo_cli.errors import ConfigError

T = TypeVar("T")

FILE = "file"
FilePath = Annotated[str, FILE]
"""The hint of an option that names a file or folder: `path` or `path:function`. Becomes absolute if it exists, because
a run folder is read from anywhere."""

CODE = "code"
CodePath = Annotated[str, FILE, CODE]
CodePaths = Annotated[Any, FILE, CODE]
"""The hint of a `FilePath` that names code, such as the function of a reward; and that of one or a list of them."""

SECRET = "secret"
SecretName = Annotated[str, SECRET]
"""The hint of an option that names an environment variable whose value is sent to a server, which the config names,
too."""

OPTIONS = tuple(f"dppo_cli.{room}." for room in ("algorithm", "data", "environment", "reward", "rollout"))
"""Where our own option classes are. A `_target_` anywhere else names the user's code."""

OUR_FUNCTIONS = ("dppo_cli.environment.calculator:reply",)
"""The same of functions. Each by its whole name: others of this package could be made to import code."""

MISSING = "???"
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 3.4028234e38
SMALLEST_FLOAT = 1.1754944e-38


def build(schema: type[T], node: DictConfig, check_code: Callable[[str, str], None] | None = None) -> T:
    """The frozen object of class `schema` that `node` describes; options hinted as `FilePath` become absolute in both.

    `check_code(key, value)` is called for whatever names code that is not ours, before it is imported, and for names of
    secrets that would be sent; it may refuse.

    Raises ConfigError for unknown keys, wrong types, unset mandatory values, values out of range, combinations that
    cannot work, and a `_target_` that is not a dataclass or lacks what its field needs. The text names the key as the
    user typed it.
    """
    try:
        plain = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None
    assert isinstance(plain, dict)
    if "_target_" in plain:
        raise ConfigError("there is no key _target_")
    builder = _Builder(check_code or (lambda key, value: None))
    built: T = builder.dataclass(schema, plain, "")
    for key, value in builder.files.items():
        if "oc.env" not in str(raw_value(node, key)):  # The value of a variable goes into no file.
            OmegaConf.update(node, key, escaped(value))
    return built


class _Builder:
    """`files`: what was made absolute, by its dotted key."""

    def __init__(self, check_code: Callable[[str, str], None]) -> None:
        self.check_code = check_code
        self.files: dict[str, str] = {}

    def dataclass(self, cls: type, node: Any, where: str) -> Any:
        known = {f.name: f for f in fields(cls) if f.init}
        for key in node:
            if key not in known and key != "_target_":
                full = _join(where, key)
                raise ConfigError(of_another_choice(full) or f"there is no key {full}{did_you_mean(str(key), known)}")
        hints = typing.get_type_hints(cls, include_extras=True)
        values = {}
        for name in known:
            key = _join(where, name)
            if node.get(name, MISSING) == MISSING:
                raise ConfigError(f"{key} is not set; add {key}=...")
            values[name] = self.value(hints[name], node[name], key)
        try:
            return cls(**values)
        except ConfigError as error:
            # An option names its keys by its group, and may be a member somewhere below it.
            group, below, _ = where.partition(".")
            if not below:
                raise
            raise ConfigError(re.sub(rf"(?<![\w.]){group}\.(?=\w)", f"{where}.", str(error))) from None

    def value(self, hint: Any, node: Any, where: str) -> Any:
        """What a field with this hint holds."""
        optional = _is_union(hint) and type(None) in typing.get_args(hint)
        if node is None and optional:
            return None
        if optional:
            kinds = tuple(h for h in typing.get_args(hint) if h is not type(None))
            inner = kinds[0] if len(kinds) == 1 else Union[kinds]  # noqa: UP007
            return self.value(inner, node, where) if _holds_objects(inner, node) else self.leaf(hint, node, where)
        if _holds_objects(hint, node):
            return self.objects(hint, node, where)
        return self.leaf(hint, node, where)

    def objects(self, hint: Any, node: Any, where: str) -> Any:
        """A value that is an object, or a list or mapping with objects in it."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if isinstance(node, list):
            if origin is not list and hint is not Any and hint is not list:
                raise ConfigError(f"{where} cannot be a list; see `dppo --help`")
            inner = arguments[0] if arguments else Any
            return [self.value(inner, child, f"{where}[{i}]") for i, child in enumerate(node)]
        if not isinstance(node, dict):
            raise ConfigError(f"{where}={node} is an invalid value; see `dppo --help`")
        if "_target_" in node:
            if hint is not Any and not (isinstance(hint, type) and _is_object(hint)):
                raise ConfigError(f"{where} cannot be an object (_target_); see `dppo --help`")
            target = str(node["_target_"])
            if not target.startswith(OPTIONS):
                self.check_code(f"{where}._target_", target)
            return self.dataclass(_located(where, target, hint), node, where)
        if is_dataclass(hint):
            return self.dataclass(typing.cast(type, hint), node, where)
        if origin in (dict, Mapping) or hint in (Any, dict):
            inner = arguments[1] if arguments else Any
            return {name: self.value(inner, child, _join(where, name)) for name, child in node.items()}
        raise ConfigError(f"{where} cannot hold keys; see `dppo --help`")

    def leaf(self, hint: Any, node: Any, where: str) -> Any:
        """Numbers, text, and lists and mappings of them, converted and checked by OmegaConf."""
        marks = {mark for h in (hint, *typing.get_args(hint)) for mark in getattr(h, "__metadata__", ())}
        is_file = FILE in marks
        kinds = [h for h in (typing.get_args(hint) if _is_union(hint) else (hint,)) if h is not type(None)]
        if not isinstance(node, list | None) and all(typing.get_origin(kind) is list for kind in kinds):
            raise ConfigError(f"{where}={node} must be a list, {where}=[{node}] for one value")
        try:
            leaf = OmegaConf.structured(_leaf(_without_annotations(hint)))
            # Resolved already: what still looks like an interpolation is text.
            value = OmegaConf.to_object(OmegaConf.merge(leaf, {"value": escaped(node)})).value  # type: ignore[union-attr]
        except (OmegaConfBaseException, OverflowError) as error:
            raise ConfigError(f"{where}: {str(error).splitlines()[0]}") from None
        _check_elements(hint, value, where)
        _check_number(hint, node, value, where)
        if (CODE in marks and value not in OUR_FUNCTIONS) or SECRET in marks:
            self.check_code(where, str(value))
        if is_file and isinstance(value, str):
            value = self.files[where] = absolute(value)
        elif is_file and isinstance(value, list):
            value = absolute(value)
            self.files.update({f"{where}[{i}]": v for i, v in enumerate(value)})
        return value


@cache
def _leaf(hint: Any) -> type:
    return make_dataclass("Leaf", [("value", hint)])


def _check_elements(hint: Any, value: Any, where: str) -> None:
    """Refuse a list in a list of numbers or text, which OmegaConf lets through."""
    kinds = [h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is list]
    if not isinstance(value, list) or not all(set(typing.get_args(kind)) <= {int, float, str, bool} for kind in kinds):
        return
    for i, element in enumerate(value if kinds else []):
        if isinstance(element, list | dict):
            raise ConfigError(f"{where}[{i}]={element} must be one value, not a list or a mapping")


def _check_number(hint: Any, node: Any, value: Any, where: str) -> None:
    """Refuse numbers that tensors cannot hold, and conversions by OmegaConf that nobody means: 7 to true, true to 1."""
    if isinstance(value, bool) and not isinstance(node, bool | str):
        raise ConfigError(f"{where}={node} must be true or false")
    if isinstance(node, bool) and not isinstance(value, bool) and hint is not Any:
        raise ConfigError(f"{where}={str(node).lower()} cannot be true or false")
    for number in value if isinstance(value, list) else [value]:
        if isinstance(number, int) and abs(number) > LARGEST_INT:
            raise ConfigError(f"{where}={number} is larger than 2^63, the largest whole number that can be used")
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError(f"{where}={number} must be a finite number")
        if isinstance(number, float) and abs(number) > LARGEST_FLOAT:
            raise ConfigError(f"{where}={number} is larger than {LARGEST_FLOAT:.2g}, the largest float32")
        if isinstance(number, float) and 0 < abs(number) < SMALLEST_FLOAT:
            raise ConfigError(f"{where}={number} is smaller than {SMALLEST_FLOAT:.2g}, the smallest float32")


def _located(where: str, target: str, hint: Any) -> type:
    """The class that `_target_` names, if it has what `hint` asks for."""
    module_name, _, class_name = target.rpartition(".")
    try:
        cls: Any = getattr(_imported(module_name), class_name)
    except (Exception, SystemExit) as error:  # whatever the user's own module does
        raise ConfigError(f"{where}._target_={target} cannot be imported: {error}") from error
    if not (isinstance(cls, type) and is_dataclass(cls)):
        raise ConfigError(f"{where}._target_={target} is not a dataclass")
    if hint is not Any and isinstance(hint, type):
        known = {*dir(cls), *(f.name for f in fields(cls))}
        lacking = [name for name in _members(hint) if name not in known]
        if lacking or (is_dataclass(hint) and not issubclass(cls, hint)):
            why = f": it lacks {', '.join(lacking)}" if lacking else ""
            raise ConfigError(f"{where}._target_={target} cannot be used as {hint.__name__}{why}")
    return cls


def _imported(name: str) -> types.ModuleType:
    """A module; one of the user's own is looked for where dppo was started, first."""
    if name in sys.modules or name.startswith("dppo_cli."):
        return importlib.import_module(name)
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            # For what it imports later. Last, so that no file here takes the place of a library.
            sys.path.append(here)


def _members(hint: type) -> list[str]:
    """What a Protocol asks of a class."""
    if not getattr(hint, "_is_protocol", False):
        return []
    return [name for name in vars(hint) if not name.startswith("_")] + ["__call__"] * ("__call__" in vars(hint))


def _holds_objects(hint: Any, node: Any) -> bool:
    """Whether a value is more than OmegaConf's types, by its hint or by what was given."""
    if isinstance(node, dict):
        return "_target_" in node or any(_holds_objects(None, child) for child in node.values()) or _is_object(hint)
    if isinstance(node, list):
        return any(_holds_objects(None, child) for child in node) or _is_object(hint)
    return _is_object(hint)


def _is_object(hint: Any) -> bool:
    if isinstance(hint, type) and (is_dataclass(hint) or getattr(hint, "_is_protocol", False)):
        return True
    return any(_is_object(argument) for argument in typing.get_args(hint))


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (Union, types.UnionType)


def _without_annotations(hint: Any) -> Any:
    """`FilePath` as the `str` that it is, inside a union, too."""
    if hasattr(hint, "__metadata__"):
        return hint.__origin__
    if _is_union(hint):
        return Union[tuple(_without_annotations(h) for h in typing.get_args(hint))]  # noqa: UP007
    return hint


def absolute(value: Any) -> Any:
    """A path as an absolute one if it exists; all other values as they are."""
    if isinstance(value, list):
        return [absolute(v) for v in value]
    if not isinstance(value, str):
        return value
    file, colon, function = value.rpartition(":")
    for path, rest in ((value, ""), (file, colon + function)):
        if path and Path(path).exists():
            return f"{Path(path).resolve()}{rest}"
    return value


def raw_value(node: DictConfig, key: str) -> Any:
    """What a config holds under a dotted key, interpolations as they are; None if there is nothing."""
    found: Any = OmegaConf.to_container(node)
    for name in re.split(r"\.|\[(?=\d+\])", key):
        name = int(name[:-1]) if name.endswith("]") else name
        try:
            found = found[name]
        except (KeyError, IndexError, TypeError):
            return None
    return found


def _join(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)
