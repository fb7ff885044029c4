"""What Hydra calls for each job, in this process or, under a launcher, in another."""

import gc
import os
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dppo_cli.cli.stop import by_joblib, stopped_with_the_sweep, times
from dppo_cli.cli.sweep import JobRecord
from dppo_cli.cli.table import COMMANDS
from dppo_cli.errors import ConfigError, DppoError, RunError, Stopped
from dppo_cli.processes.lasting import load


@dataclass
class HydraJob:
    """Runs one command. Can be pickled: launchers send it to other processes.

    A job of a sweep (`-m`) never raises, so that the others run, too: how it ended is in job.json in its folder. Of a
    single run a user's mistake is kept in `failure`, because Hydra would print lines of its own about it. `stop_file`:
    see stop.py.
    """

    command: str
    stop_file: Path = Path(os.devnull)
    process: int = field(default_factory=os.getpid)
    composed: bool = False
    failure: DppoError | None = None

    def __call__(self, node: DictConfig) -> float | None:
        """The held-out accuracy, for sweepers that search; None where there is none."""
        self.composed = True
        if HydraConfig.get().mode is RunMode.MULTIRUN:
            if os.getpid() == self.process:
                return self._job(node)
            # Live displays of jobs that share a terminal would overwrite each other.
            os.environ["TTY_COMPATIBLE"] = "0"
            if not by_joblib(HydraConfig.get()):
                return self._job(node)
            with stopped_with_the_sweep(self.stop_file):
                return None if times(self.stop_file) else self._job(node)
            return None
        try:
            return _accuracy(self._run(node))
        except DppoError as error:
            self.failure = error
            return None

    def _job(self, node: DictConfig) -> float | None:
        from dppo_cli.kernels.memory import return_freed_memory  # needs torch, like the job itself

        hydra = HydraConfig.get()
        folder = Path(hydra.runtime.output_dir)
        if (folder.parent / "config.yaml").is_file():
            # Said at the end, like a user's mistake in a single run; a record would be written into the run.
            self.failure = RunError(f"{folder.parent} holds a run; a sweep needs a folder of its own, run_dir=...")
            return None
        key = COMMANDS[self.command].job_key
        if key is not None:
            # A folder that the user names for all jobs has one for each.
            given = None if key == "run_dir" else node[key]
            node[key] = str(folder) if given is None else str(Path(str(given)) / str(hydra.job.num))
        record = JobRecord(number=hydra.job.num, overrides=[word.lstrip("+") for word in _words()])
        try:
            record.summary = self._run(node)
        except DppoError as error:
            record.status, record.error = error.exit_status, str(error)
        except (Stopped, KeyboardInterrupt) as error:
            record.status, record.error = getattr(error, "exit_status", 130), f"stopped: {error}"
            raise
        except Exception as error:
            record.status, record.error = 1, f"{type(error).__name__}: {error}"
            traceback.print_exc()
        finally:
            record.write(folder)
            # A run's parts know each other; the next job needs the memory of this one's model, in other pieces.
            gc.collect()
            return_freed_memory(worth_it=0)
        return _accuracy(record.summary)

    def _run(self, node: DictConfig) -> dict[str, Any]:
        try:
            return self._command(node)
        except OSError as error:
            raise RunError(f"{error.filename}: {error.strerror or error}") from error
        except (RuntimeError, MemoryError) as error:
            from dppo_cli.training.failures import out_of_memory

            raise out_of_memory(error) or error from None

    def _command(self, node: DictConfig) -> dict[str, Any]:
        from dppo_cli.config.build import build
        from dppo_cli.config.saved import to_yaml

        with open_dict(node):
            # Hydra leaves the recipe's choices here.
            node.pop("recipes", None)
        command = COMMANDS[self.command]
        # Most import torch, which help, typing errors and `dppo doctor` do without.
        module = load(f"dppo_cli.commands.{command.module}")
        prepare = load(f"dppo_cli.commands.{command.prepare}").prepare
        try:
            node = prepare(node, _words())
            config = build(getattr(module, command.schema), node)
            text = to_yaml(node)
        except OmegaConfBaseException as error:  # An interpolation that fails does so when it is read.
            raise ConfigError(f"{error.full_key or error.key or 'config'}: {str(error).splitlines()[0]}") from None
        summary: dict[str, Any] = getattr(module, f"run_{self.command}")(config, text)
        return summary


def _words() -> list[str]:
    """What was typed, interpolations as they are."""
    found: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    return list(found)


def _accuracy(summary: dict[str, Any] | None) -> float | None:
    return None if summary is None else summary.get("eval_after", summary.get("accuracy"))
