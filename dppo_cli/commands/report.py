"""`dppo report`: a run or a sweep as one HTML file, or as a page that follows it while it goes on. Imports no torch."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dppo_cli.config.checks import check_rules
from dppo_cli.errors import ConfigError, RunError
from dppo_cli.telemetry.report.page import Served, plotly_js
from dppo_cli.telemetry.report.run_page import run_page
from dppo_cli.telemetry.report.serve import HOST, Pages, make_server, serve
from dppo_cli.telemetry.report.sweep_page import sweep_page
from dppo_cli.telemetry.table import print_table


@dataclass(frozen=True)
class ReportConfig:
    """Everything `dppo report` needs."""

    run: str | None
    sweep: str | None
    out: str | None
    overwrite: bool
    serve: bool
    port: int
    refresh: float

    def __post_init__(self) -> None:
        rules = {"0 <= port <= 65535": 0 <= self.port <= 65535, "1 <= refresh <= 3600": 1 <= self.refresh <= 3600}
        check_rules("", self, rules)
        if (self.run is None) == (self.sweep is None):
            what = "nothing to report" if self.run is None else "a report is of one of run=... and sweep=..."
            raise ConfigError(f"{what}; add run=runs/last, or sweep=FOLDER for the jobs of a sweep, and not both")
        if self.serve and self.out is not None:
            raise ConfigError(f"out={self.out} is for a report in a file; leave it out, or leave out serve=true")
        if not self.serve and self.out is None:
            raise ConfigError("a report needs a file: add out=report.html, or serve=true to look at it in a browser")


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build."""
    return node


def run_report(config: ReportConfig, config_yaml: str) -> dict[str, Any]:
    """Write the file, or serve the page until Ctrl-C; returns where it is or was."""
    plotly_js()  # Without it nothing can be drawn; said before anything is read.
    folder = Path(str(config.run or config.sweep))
    make = run_page if config.run is not None else sweep_page
    if config.serve:
        return _serve(config, folder, make)
    out = Path(str(config.out))
    if out.is_dir() or (os.path.lexists(out) and not config.overwrite):  # A link to nowhere is there, too.
        what = (
            "is a folder; name a file" if out.is_dir() else "exists already; name another file, or add overwrite=true"
        )
        raise RunError(f"out={out} {what}")
    if not out.parent.is_dir():
        raise RunError(f"out={out} cannot be written: there is no folder {out.parent}")
    page = make(folder).encode()
    # Complete or not at all, because somebody may be looking at the file that was there before.
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(page)
        temporary.replace(out)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"out={out} cannot be written: {error.strerror}") from None
    print_table("report", [("of", str(folder)), ("written to", str(out)), ("size", f"{len(page) / 1e6:.1f} MB")])
    return {"out": str(out), "bytes": len(page)}


def _serve(config: ReportConfig, folder: Path, make: Callable[[Path, Served | None], str]) -> dict[str, Any]:
    pages = Pages(folder, lambda served: make(folder, served), config.refresh)
    pages()  # What cannot be read is said here, not in the browser.
    server = make_server(pages, config.port)
    url = f"http://{HOST}:{server.server_address[1]}/"
    print(f"{folder} is at {url}; Ctrl-C ends this", flush=True)
    serve(server)
    return {"url": url}
