"""Broken run folders: eval, export and resume use what the run wrote, or say in one line what is wrong with it."""

from collections.abc import Callable
from pathlib import Path

from broken import case, wrong
from cases import Server, failures

Seeds = Callable[..., range]


def test_broken_runs(seeds: Seeds, servers: list[Server], prepared: Path, tmp_path: Path) -> None:
    cases = (case(seed, prepared) for seed in seeds(20, 10))
    found = failures(cases, tmp_path, servers, lambda result: wrong(result, prepared))
    assert found == "", found
