"""Stopping a sweep whose jobs joblib runs in other processes.

Joblib kills these when it is interrupted, and leaves them running when it is killed. So a signal to the sweep goes into
a file that each of its jobs looks at. A job that finds one there, or finds that the sweep's process is gone, stops as a
single run does (training/stopping.py): the first time after its step, the second time at once, saved. Jobs that have
not begun do not begin. A third signal is joblib's.

Jobs that submitit starts hear signals themselves, and those on a cluster go on without the sweep's process.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from dppo_cli.errors import Stopped
from dppo_cli.training.stopping import STOPPING

EVERY = 0.5
"""Seconds between two looks."""
SAID = ("each job stops after its step, and is saved; once more to stop at once", "each job stops now")


class StopsJobs:
    """`with StopsJobs(sweep_dir):` where a sweep is. `file` has a byte for each signal, `signum` is the first."""

    def __init__(self, sweep_dir: Path) -> None:
        self.file = (sweep_dir / ".stop").absolute()
        self.signum: int | None = None
        self.times = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "StopsJobs":
        Launching.by_joblib = False
        if os.path.exists(self.file):  # of a sweep that was killed
            self.file.unlink()
        if threading.current_thread() is threading.main_thread():
            for signum in STOPPING:
                if signal.getsignal(signum) is not signal.SIG_IGN:
                    self.before[signum] = signal.signal(signum, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()
        if self.times:
            self.file.unlink(missing_ok=True)

    def _restore(self) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
        self.before = {}

    def _stop(self, signum: int, frame: FrameType | None) -> None:
        if self.times == len(SAID) or not Launching.by_joblib:
            self._restore()
            os.kill(os.getpid(), signum)
            return
        self.signum = self.signum or signum
        self.times += 1
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(b"." * self.times)
        with suppress(OSError):  # Nobody may read any more, which is no reason to end the launcher.
            print(f"dppo: {signal.Signals(signum).name}: {SAID[self.times - 1]}", file=sys.stderr, flush=True)


class Launching(Callback):
    """Hydra tells it of a sweep."""

    WORD = "+hydra.callbacks.dppo._target_=dppo_cli.cli.stop.Launching"
    by_joblib = False

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        Launching.by_joblib = by_joblib(config.hydra)


def by_joblib(hydra: Any) -> bool:
    return str(OmegaConf.select(hydra, "launcher._target_")).endswith(".JoblibLauncher")


@contextmanager
def stopped_with_the_sweep(file: Path) -> Iterator[None]:
    """Around a job in a process of joblib's. Stopped ends here: joblib would kill the other jobs."""
    watch = _Watch.of_this_process()
    with suppress(Stopped):
        before = signal.signal(signal.SIGTERM, _not_at_work)
        watch.job(file)
        try:
            yield
        finally:
            watch.job(None)
            signal.signal(signal.SIGTERM, before)


def _not_at_work(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum, "no step was finished; nothing is saved")


class _Watch(threading.Thread):
    """Looks at the file for as long as a process lives, which may run several jobs, one after the other."""

    one: "_Watch | None" = None

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.parent = os.getppid()
        self.lock = threading.Lock()
        self.file: Path | None = None
        self.told = 0

    @classmethod
    def of_this_process(cls) -> "_Watch":
        if cls.one is None:
            # A terminal sends Ctrl-C to all, and a process that it ends between two jobs would end the others.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            cls.one = cls()
            cls.one.start()
        return cls.one

    def job(self, file: Path | None) -> None:
        """A job begins, or the one there was has ended."""
        with self.lock:
            self.file, self.told = file, 0

    def run(self) -> None:
        while True:
            time.sleep(EVERY)
            gone = os.getppid() != self.parent
            with self.lock:
                asked = int(gone) if self.file is None else max(gone, times(self.file))
                if asked > self.told:
                    # Between jobs it ends the process, within one it is heard.
                    os.kill(os.getpid(), signal.SIGTERM)
                    self.told += 1


def times(file: Path) -> int:
    """How often a sweep was asked to stop."""
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
