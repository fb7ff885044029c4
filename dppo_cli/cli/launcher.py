"""Processes that a launcher such as torchrun has started, as their environment tells. Imports no torch."""

import os

from dppo_cli.errors import ConfigError


def launched() -> int:
    """How many; 1 if there is no launcher."""
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if size.isdecimal() else 1


def speaker() -> str:
    """What the messages of this process begin with: its number, where it is not the main one of several."""
    rank = os.environ.get("RANK", "0")
    return f"process {int(rank) + 1} of {launched()}: " if launched() > 1 and rank.isdecimal() and int(rank) else ""


def check_launcher(command: str, *, sweeps: bool) -> None:
    """Raise ConfigError for what several processes that a launcher has started cannot share."""
    if launched() == 1 or (command == "train" and not sweeps):
        return
    if speaker():
        raise SystemExit(ConfigError.exit_status)  # The main process says why.
    what, alone = f"dppo {command}", "start it by itself"
    if sweeps:
        what, alone = "a sweep (-m)", f"{alone}, with hardware.processes=... for its jobs"
    elif command in ("eval", "compare"):
        alone = f"{alone}, with hardware.processes={launched()}"
    raise ConfigError(f"{what} does not work under a launcher, which has started {launched()} processes; {alone}")
