"""Command lines of all kinds end in a result or in one line, write only where they may, and run nothing foreign."""

from collections.abc import Callable
from pathlib import Path

from cases import Server, failures
from lines import line

Seeds = Callable[..., range]


def test_command_lines(seeds: Seeds, servers: list[Server], prepared: Path, tmp_path: Path) -> None:
    wrong = failures((line(seed, prepared) for seed in seeds(30)), tmp_path, servers)
    assert wrong == "", wrong


def test_a_seed_is_a_command_line(prepared: Path) -> None:
    """What failed can be run again by its number."""
    assert [str(line(seed, prepared)) for seed in range(50)] == [str(line(seed, prepared)) for seed in range(50)]
    assert len({str(line(seed, prepared)) for seed in range(50)}) == 50
