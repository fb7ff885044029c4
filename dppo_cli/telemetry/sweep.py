"""The table at the end of a sweep (`-m`): what varied in each job, and what came out."""

import os
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from dppo_cli.errors import DppoError


class SweepTable(Callback):
    """A Hydra callback; does nothing in a single run. A subclass because Hydra asks for one."""

    def __init__(self) -> None:
        self.jobs: list[JobReturn] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        self.jobs.append(job_return)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        words = [list(job.overrides or ()) for job in self.jobs]
        same = set.intersection(*map(set, words)) if len(words) > 1 else set()
        table = Table(title="sweep")
        for name in ("job", "overrides", "before", "after", "seconds", "folder"):
            table.add_column(name, overflow="fold")
        for number, job in enumerate(self.jobs):
            overrides = " ".join(word for word in words[number] if word not in same)
            result = job.return_value if job.status is JobStatus.COMPLETED else None
            if isinstance(result, dict):
                table.add_row(str(number), overrides, *_cells(result))
            elif isinstance(result, DppoError):
                table.add_row(str(number), overrides, "-", "-", "-", f"failed: {result}")
        Console(highlight=False).print(table)


def _cells(summary: dict[str, Any]) -> list[str]:
    def percent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    before, after = summary.get("eval_before"), summary.get("eval_after", summary.get("accuracy"))
    folder = os.path.relpath(summary["run_dir"]) if "run_dir" in summary else ""
    return [percent(before), percent(after), f"{summary.get('seconds', 0):.0f}", folder]
