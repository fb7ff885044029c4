"""`dppo doctor`: what is installed and whether it works here, before anybody trains.

Whatever may be missing or broken is imported inside a check, and a check that fails is a row like all others.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from dppo_cli.commands.checkup.machine import (
    embedded_model,
    gpus,
    kernels,
    memory,
    mps,
    processor,
    quantises,
    resolved,
    start_nf4,
)
from dppo_cli.commands.checkup.row import OK, PROBLEM, WARNING, Row, first_line
from dppo_cli.commands.checkup.software import extras, packages, python
from dppo_cli.commands.checkup.surroundings import disk, reaches_hub, signatures, start_hub, token
from dppo_cli.config.sections import Hardware
from dppo_cli.errors import DppoError
from dppo_cli.telemetry.table import RichConsole

COLOURS = {OK: "green", WARNING: "yellow", PROBLEM: "red"}


@dataclass(frozen=True)
class DoctorConfig:
    """Everything `dppo doctor` needs."""

    hardware: Hardware
    json: bool


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build."""
    return node


def run_doctor(config: DoctorConfig, config_yaml: str) -> dict[str, Any]:
    """Print a table, or JSON, and return what JSON holds. Raises DppoError if there is a problem."""
    rows = examine(config.hardware)
    report = {"status": max((row.status for row in rows), key=list(COLOURS).index), "rows": [asdict(r) for r in rows]}
    if config.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        _print(rows)
    broken = [row.part for row in rows if row.status == PROBLEM]
    if broken:
        raise DppoError(f"training fails here until this is mended: {', '.join(broken)}")
    return report


def examine(hardware: Hardware) -> list[Row]:
    """All rows, in order. What takes long runs beside the rest."""
    nf4, hub = start_nf4(hardware.device), start_hub()
    checks: dict[str, Callable[[], Iterable[Row]]] = {
        "python": python,
        "packages": packages,
        "extras": extras,
        "processor": processor,
        "memory": memory,
        "gpu": gpus,
        "kernels": kernels,
        "mps": mps,
        "hardware": partial(resolved, hardware),
        "embedded model": partial(embedded_model, hardware),
        "nf4": partial(quantises, nf4),
        "disk": disk,
        "signatures": signatures,
        "hub": partial(reaches_hub, *hub),
        "hub token": token,
    }
    rows: list[Row] = []
    for name, check in checks.items():
        try:
            rows += check()
        except Exception as error:  # of libraries that are broken in any way
            rows.append(Row(name, PROBLEM, f"cannot be looked at: {first_line(error)}"))
    return rows


def _print(rows: Sequence[Row]) -> None:
    table = Table(title="doctor", show_header=False)
    for _ in range(2):
        table.add_column()
    table.add_column(overflow="fold")
    for row in rows:
        fix = f"\n{escape(row.fix)}" if row.fix else ""
        table.add_row(f"[{COLOURS[row.status]}]{row.status}[/]", escape(row.part), f"{escape(row.text)}[bold]{fix}[/]")
    RichConsole(highlight=False).print(table)
