"""The folder of a sweep: removed when no job left anything, kept otherwise."""

from pathlib import Path

import pytest

from dppo_cli.cli.sweep import JobRecord, remove_if_empty


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two failed jobs, as Hydra and the jobs leave them."""
    for number in (0, 1):
        JobRecord(number, [], status=2, error="no").write(tmp_path / "sweep" / str(number))
    (tmp_path / "sweep/multirun.yaml").write_text("")
    return tmp_path / "sweep"


def test_a_sweep_in_which_nothing_ran_is_removed(sweep: Path) -> None:
    remove_if_empty(sweep)
    assert not sweep.exists()
    remove_if_empty(sweep)


def test_the_file_of_a_search_does_not_count(sweep: Path) -> None:
    (sweep / "optimization_results.yaml").write_text("")
    remove_if_empty(sweep)
    assert not sweep.exists()


def test_a_sweep_in_which_something_ran_is_kept(sweep: Path) -> None:
    (sweep / "1/config.yaml").write_text("")
    before = sorted(sweep.rglob("*"))
    remove_if_empty(sweep)
    assert sorted(sweep.rglob("*")) == before


def test_a_job_that_only_returned_something_is_kept(sweep: Path) -> None:
    """As an export does, which writes into the folder of the run."""
    JobRecord(1, [], summary={"out": "elsewhere"}).write(sweep / "1")
    remove_if_empty(sweep)
    assert {p.name for p in sweep.iterdir()} == {"0", "1", "multirun.yaml"}
