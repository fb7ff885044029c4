"""Which checkpoints are kept, and that removing the others leaves nothing that seems complete."""

from pathlib import Path

import make
import pytest
from checkpoint_cases import steps_of, write

from dppo_cli.training.checkpoint import checkpoint_path, newest_good, prune


@pytest.mark.parametrize(
    ("keep", "also", "left"),
    [(1, [], [10]), (2, [], [9, 10]), (9, [], [1, 2, 9, 10]), (1, [2], [2, 10]), (2, [9], [9, 10]), (1, [5], [10])],
)
def test_the_newest_and_the_best_are_kept(keep: int, also: list[int], left: list[int], tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 9, 10)
    prune(tmp_path, 10, keep, also)
    assert steps_of(tmp_path) == left


def test_damaged_ones_of_later_steps_do_not_push_out_good_ones(tmp_path: Path) -> None:
    """The run went on from step 2, because those after it are damaged, and has now saved step 3."""
    for later in write(tmp_path, 2, 3, 4, 6)[2:]:
        (later / "state.json").unlink()
    prune(tmp_path, 3, 1, [])
    assert steps_of(tmp_path) == [3]
    assert newest_good(tmp_path, make.fail) == checkpoint_path(tmp_path, 3)


def test_an_interrupted_removal_leaves_nothing_that_seems_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, newer = write(tmp_path, 2, 4)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        prune(tmp_path, 4, 1, [])
    assert steps_of(tmp_path) == [2, 4]
    warned: list[str] = []
    (newer / "state.json").unlink()
    assert newest_good(tmp_path, warned.append) is None
    assert [Path(w.split(" is ")[0]) for w in warned] == [newer, older]


def test_what_is_no_folder_is_not_pruned(tmp_path: Path) -> None:
    """It may be a link to a disk with more room, and it must not end the run."""
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for path in (folder / "step-3", elsewhere):
        path.mkdir(parents=True)
        (path / "manifest.json").write_text("{}")
    (folder / "step-1").symlink_to("/dev/null")
    (folder / "step-2").symlink_to(elsewhere)
    prune(tmp_path, 4, 1, [4])
    assert sorted(path.name for path in folder.iterdir()) == ["step-1", "step-2", "step-3"]
    (folder / "step-4").mkdir()
    prune(tmp_path, 4, 1, [4])
    assert sorted(path.name for path in folder.iterdir()) == ["step-1", "step-2", "step-4"]
    assert (elsewhere / "manifest.json").is_file()
