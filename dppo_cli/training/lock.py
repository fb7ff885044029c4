"""The lock of a run folder: one process at a time has a run open. Imports no torch."""

import fcntl
from pathlib import Path
from typing import IO

from dppo_cli.errors import RunError

LOCK = ".lock"


def hold(path: Path) -> IO[str]:
    """Held until it is closed or the process ends, in whatever way; nothing where the file system has no locks."""
    if (path / LOCK).exists() and not (path / LOCK).is_file():  # a pipe would be waited for
        raise RunError(f"{path / LOCK} is not a file; delete it")
    file = (path / LOCK).open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RunError(f"run_dir={path} is in use by another process; wait for it, or choose another run_dir") from None
    except OSError:
        pass
    return file


def is_held(run: Path) -> bool:
    """Whether a process has the run open. A shared lock that is given back at once stands in nobody's way."""
    if not (run / LOCK).is_file():
        return False
    try:
        with (run / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
