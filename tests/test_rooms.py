"""The order of the rooms: a room imports only from rooms below it, for type checking and inside functions, too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import dppo_cli

PACKAGE = Path(dppo_cli.__file__).parent
ROOMS = [
    {"__main__"},
    {"cli"},
    {"commands", "embedded"},
    {"telemetry"},
    {"reading"},
    {"training"},
    {"rollout"},
    {"policy"},
    {"reward", "data", "environment"},
    {"algorithm"},
    {"kernels"},
    {"calls"},
    {"config"},
    {"processes"},
    {"world"},
    {"types"},
    {"errors"},
    {"__init__"},
]
"""From the top. Rooms beside each other do not know each other."""
HANDED_ON = {"__init__": {"reading"}}
"""The package offers what a room far above it has, and imports it when it is asked for."""
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(module: Path) -> str:
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST) -> Iterator[str]:
    """Names of the modules that a module imports from this package, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "dppo_cli")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the module in full"
            parts = (node.module or "").split(".")
            if parts == ["dppo_cli"]:
                yield from (f"dppo_cli.{alias.name}" for alias in node.names)
            elif parts[0] == "dppo_cli":
                yield ".".join(parts)


def room_imported(name: str) -> str:
    room = name.split(".")[1] if "." in name else "__init__"
    return room if room in LEVEL else "__init__"  # `from dppo_cli import __version__`


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_from_rooms_below_it(module: Path) -> None:
    own = room_of(module)
    rooms = {room_imported(name) for name in imported(ast.parse(module.read_text(encoding="utf-8")))} - {own}
    above = {room for room in rooms if LEVEL[room] <= LEVEL[own]}
    assert above == HANDED_ON.get(own, set())


def test_an_import_from_above_would_be_found() -> None:
    code = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dppo_cli.commands.schemas import TrainConfig\n"
        "def f():\n    import dppo_cli.telemetry.watch\n    from dppo_cli import cli, __version__\n"
    )
    rooms = {room_imported(name) for name in imported(ast.parse(code))}
    assert rooms == {"commands", "telemetry", "cli", "__init__"}


def test_every_room_has_a_level() -> None:
    assert {room_of(module) for module in MODULES} == set(LEVEL)


def test_modules_are_short() -> None:
    long = {str(p.relative_to(PACKAGE)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 350}
    assert long == {}
