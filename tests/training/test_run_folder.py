"""Run folders: where they may be, what is written whole or not at all, and where runs/last points."""

import math
import os
import shutil
from collections import namedtuple
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from helpers import read_json, read_lines

from dppo_cli.config.saved import is_ours
from dppo_cli.errors import RunError
from dppo_cli.training.files import parse_json
from dppo_cli.training.run_folder import (
    SPARE_BYTES,
    RunFolder,
    check_disk,
    check_free,
    default_run_dir,
    point_last,
)

DiskUsage = namedtuple("DiskUsage", "total used free")


def write_adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")


def break_off(path: Path) -> None:
    write_adapter(path)
    raise full()


def full() -> OSError:
    return OSError(28, "No space left on device")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folder(needed_bytes: int = 0) -> RunFolder:
    return RunFolder(Path("run"), "steps: 1\n", needed_bytes)


# Where


def test_a_default_folder_is_named_by_the_time_and_never_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> "Clock":
            return cls(2026, 3, 4, 5, 6, 7)

    monkeypatch.setattr("dppo_cli.training.run_folder.datetime", Clock)
    names = []
    for _ in range(3):
        path = default_run_dir("runs")
        path.mkdir(parents=True)
        names.append(str(path))
    assert names == ["runs/2026-03-04_05-06-07", "runs/2026-03-04_05-06-07_2", "runs/2026-03-04_05-06-07_3"]


def test_new_and_empty_folders_are_free() -> None:
    check_free(Path("a/b/c"), "run_dir")
    Path("empty").mkdir()
    check_free(Path("empty"), "run_dir")


def test_what_is_not_free() -> None:
    Path("run").mkdir()
    Path("run/notes").write_text("mine")
    with pytest.raises(RunError, match=r"out=run is not empty; name a new folder"):
        check_free(Path("run"), "out")
    Path("run/multirun.yaml").write_text("")
    with pytest.raises(RunError, match=r"run_dir=run already holds a sweep"):
        check_free(Path("run"), "run_dir")
    Path("run/config.yaml").write_text("")
    with pytest.raises(RunError, match=r"run_dir=run already holds a run"):
        check_free(Path("run"), "run_dir")
    with pytest.raises(RunError, match=r"run_dir=run/notes is a file"):
        check_free(Path("run/notes"), "run_dir")
    with pytest.raises(RunError, match=r"run_dir=run/notes/x/y cannot be written: \S+notes is a file"):
        check_free(Path("run/notes/x/y"), "run_dir")


def test_back_from_a_folder_that_is_not_there() -> None:
    """Its folders would be made on the way."""
    Path("here").mkdir()
    with pytest.raises(RunError, match=r"out=here/nope/\.\./new leads nowhere: there is no folder here/nope;"):
        check_free(Path("here/nope/../new"), "out")
    check_free(Path("here/../new"), "out")
    assert [path.name for path in Path().iterdir()] == ["here"]


def test_permission_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def access(path: Path, mode: int) -> bool:
        asked.append((Path(path), mode))
        return False

    monkeypatch.setattr(os, "access", access)
    with pytest.raises(RunError, match="no permission in"):
        check_free(Path("a/b"), "run_dir")
    assert asked == [(tmp_path, os.W_OK | os.X_OK)]


def test_room_on_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, 10 * 2**20))
    check_disk(Path("a/b"), 10 * 2**20)
    with pytest.raises(RunError, match=r"a/b needs 11 MiB and the disk has 10 MiB free"):
        check_disk(Path("a/b"), 11 * 2**20)


def test_a_run_asks_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, SPARE_BYTES + 3 * 4096))
    folder(3 * 4096)
    with pytest.raises(RunError, match="needs"):
        folder(4 * 4096)
    assert not Path("run").exists()


# What is written


def names() -> set[str]:
    return {str(p.relative_to("run")) for p in Path("run").rglob("*") if p.is_file()}


def test_a_run_that_goes_well() -> None:
    with folder() as run:
        text = Path("run/config.yaml").read_text()
        assert text.startswith("steps: 1\n# signature: ") and is_ours(text)
        run.log({"step": 1, "reward": 0.5})
        run.log({"step": 2, "reward": None})
        assert run.save_adapter(write_adapter) == Path("run/adapter")
        run.write("summary.json", {"steps": 2})
    assert read_lines(Path("run/metrics.jsonl")) == [{"step": 1, "reward": 0.5}, {"step": 2, "reward": None}]
    assert read_json(Path("run/summary.json")) == {"steps": 2}
    assert names() == {".lock", "adapter/adapter_config.json", "config.yaml", "metrics.jsonl", "summary.json"}


def test_metrics_are_json_whatever_was_measured() -> None:
    with folder() as run:
        run.log({"step": 1, "divergence_p100": math.inf, "memory": {"peak": math.nan, "now": 1.5}})
    line = Path("run/metrics.jsonl").read_text()
    assert parse_json(line) == {"step": 1, "divergence_p100": None, "memory": {"peak": None, "now": 1.5}}


def test_an_adapter_is_written_whole_or_not_at_all() -> None:
    with folder() as run:
        run.log({"step": 1})
        with pytest.raises(OSError, match="No space"):
            run.save_adapter(break_off)
        assert not Path("run/adapter").exists()
        run.save_adapter(write_adapter)
    assert names() == {".lock", "adapter/adapter_config.json", "config.yaml", "metrics.jsonl"}


def test_an_adapter_replaces_the_one_before() -> None:
    with folder() as run:
        run.log({"step": 1})
        run.save_adapter(write_adapter)
        Path("run/adapter/of_before").touch()
        with pytest.raises(OSError, match="No space"):
            run.save_adapter(break_off)
        assert Path("run/adapter/of_before").exists()
        run.save_adapter(write_adapter)
    assert [p.name for p in Path("run/adapter").iterdir()] == ["adapter_config.json"]


def test_a_summary_is_written_whole_or_not_at_all() -> None:
    with folder() as run:
        run.log({"step": 1})
        run.write("summary.json", {"steps": 1})
        with pytest.raises(TypeError):
            run.write("summary.json", {"steps": object()})
        assert read_json(Path("run/summary.json")) == {"steps": 1}


# runs/last


def test_last_is_a_relative_link_that_moves(tmp_path: Path) -> None:
    for name in ("runs/one", "elsewhere/two"):
        Path(name).mkdir(parents=True)
        point_last(Path(name))
        assert Path("runs/last").resolve() == tmp_path / name
    assert os.readlink("runs/last") == "../elsewhere/two"
    # The whole tree can be moved.
    Path("runs").rename("moved")
    assert Path("moved/last").resolve() == tmp_path / "elsewhere/two"


def test_last_is_set_by_the_first_step() -> None:
    with folder() as run:
        assert not Path("runs/last").exists()
        run.log({"step": 1})
        assert Path("runs/last/config.yaml").is_file()


def test_a_file_system_without_links_goes_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: str) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    with folder() as run:
        run.log({"step": 1})
    assert list(Path("runs").iterdir()) == []
