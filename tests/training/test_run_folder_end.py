"""What is left in a run folder after a failure, and what a run that goes on finds and removes."""

import os
from pathlib import Path

import pytest
from helpers import read_lines

from dppo_cli.errors import ConfigError, RunError, Stopped
from dppo_cli.training.run_folder import RunFolder, point_last


def write_adapter(path: Path) -> None:
    path.mkdir()
    (path / "adapter_config.json").write_text("{}")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def folder(*, goes_on: bool = False) -> RunFolder:
    return RunFolder(Path("run"), "steps: 1\n", 0, goes_on=goes_on)


def names() -> set[str]:
    return {str(p.relative_to("run")) for p in Path("run").rglob("*") if p.is_file()}


def fail_after(steps: int, error: BaseException) -> None:
    with folder() as run:
        for step in range(steps):
            run.log({"step": step + 1})
        raise error


# What a failure leaves


FAILURES = [ConfigError("no"), OSError(28, "No space left on device"), KeyboardInterrupt(), Stopped(15)]


@pytest.mark.parametrize("error", FAILURES, ids=lambda error: type(error).__name__)
def test_a_failure_before_the_first_step_leaves_nothing(error: BaseException, tmp_path: Path) -> None:

    def start() -> None:
        with folder() as run:
            run.save_adapter(write_adapter)
            Path("run/checkpoints/step-0").mkdir(parents=True)
            raise error

    with pytest.raises(type(error)) as raised:
        start()
    assert raised.value is error
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_a_step_keeps_it() -> None:
    with pytest.raises(ConfigError):
        fail_after(1, ConfigError("no"))
    assert read_lines(Path("run/metrics.jsonl")) == [{"step": 1}]


def test_an_empty_folder_that_was_there_before_stays() -> None:
    Path("run").mkdir()
    with pytest.raises(ConfigError):
        fail_after(0, ConfigError("no"))
    assert list(Path("run").iterdir()) == []


@pytest.mark.parametrize("there_before", [True, False])
def test_files_that_are_not_the_runs_stay(there_before: bool) -> None:
    """A record of the sweep, or what the user, or the user's reward function, has put there."""
    if there_before:
        Path("run").mkdir()
        Path("run/job.json").write_text("{}")

    def start() -> None:
        with folder():
            Path("run/notes").mkdir()
            Path("run/notes/mine.txt").write_text("mine")
            raise ConfigError("no")

    with pytest.raises(ConfigError):
        start()
    assert names() == {"notes/mine.txt"} | ({"job.json"} if there_before else set())


def test_a_run_that_goes_on_and_fails_keeps_everything() -> None:
    fail_after_two()
    before = names()
    with pytest.raises(ConfigError), folder(goes_on=True):
        raise ConfigError("no")
    assert names() == before == {".lock", "config.yaml", "metrics.jsonl"}


def fail_after_two() -> None:
    """A run of two steps, which was then stopped."""
    with pytest.raises(Stopped):
        fail_after(2, Stopped(15))


def test_a_folder_that_cannot_be_written_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills up with the first file."""

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(RunError, match=r"run_dir=run cannot be written: No space left on device"), folder():
        pytest.fail("it was opened")
    assert list(tmp_path.iterdir()) == []


# Going on


def test_what_a_killed_process_left_unfinished_is_removed() -> None:
    """And the results of the end, which the run will write anew: until then they would be false."""
    fail_after_two()
    for name in (".adapter.tmp", "adapter", "checkpoints/.step-2.tmp", "checkpoints/step-1", "notes"):
        Path("run", name).mkdir(parents=True)
        Path("run", name, "file").touch()
    for name in (".summary.json.tmp", "summary.json", "masked_tokens.json"):
        Path("run", name).touch()
    with folder(goes_on=True):
        expected = {".lock", "checkpoints/step-1/file", "config.yaml", "metrics.jsonl", "notes/file"}
        assert names() == expected
    assert names() == expected


@pytest.mark.parametrize("torn", ["", '{"step": 3', '{"step": 3}'], ids=["whole", "torn", "without line break"])
@pytest.mark.parametrize("steps", [0, 1, 2])
def test_steps_after_the_checkpoint_are_cut_off(steps: int, torn: str) -> None:
    fail_after_two()
    with Path("run/metrics.jsonl").open("a") as file:
        file.write(torn)
    with folder(goes_on=True) as run:
        run.cut(steps)
        assert run.steps_logged == steps
        assert read_lines(Path("run/metrics.jsonl")) == [{"step": step + 1} for step in range(steps)]
        run.log({"step": steps + 1})
    assert read_lines(Path("run/metrics.jsonl")) == [{"step": step + 1} for step in range(steps + 1)]


@pytest.mark.parametrize("torn", ["", '{"step": 3'], ids=["missing", "torn"])
def test_lines_that_were_lost_are_noticed(torn: str) -> None:
    """A torn line is no line, and nothing is thrown away."""
    fail_after_two()
    with Path("run/metrics.jsonl").open("a") as file:
        file.write(torn)
    before = Path("run/metrics.jsonl").read_bytes()
    with folder(goes_on=True) as run:
        with pytest.raises(RunError, match=r"run/metrics.jsonl has 2 lines, but the checkpoint is of step 3: lines we"):
            run.cut(3)
        assert Path("run/metrics.jsonl").read_bytes() == before
        Path("run/metrics.jsonl").unlink()
        with pytest.raises(RunError, match="has 0 lines, but the checkpoint is of step 1"):
            run.cut(1)
        run.cut(0)


def test_last_points_at_a_run_that_goes_on() -> None:
    fail_after_two()
    Path("elsewhere").mkdir()
    point_last(Path("elsewhere"))
    with folder(goes_on=True) as run:
        run.cut(2)
        assert Path("runs/last/config.yaml").is_file()


def test_the_warnings_of_steps_that_run_again_are_taken_back() -> None:
    def warned() -> list[str]:
        return [row["warning"] for row in read_lines(Path("run/warnings.jsonl"))]

    with folder() as run:
        run.log({"step": 1})
        for text in ("first", "second \u2028 line\n"):
            run.warned(text)
        assert warned() == ["first", "second \u2028 line\n"], "while it goes on"
    with Path("run/warnings.jsonl").open("a") as file:
        file.write('{"warning": "th')
    with folder(goes_on=True) as run:
        run.warned_before(["first"])
        run.warned("other")
        assert warned() == ["first", "other"]
        run.warned_before([])
        assert not Path("run/warnings.jsonl").exists()


def test_a_warning_never_ends_a_run_nor_makes_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    run = folder()
    run.warned("before it is open")
    assert not Path("run").exists()
    with run:
        Path("run/warnings.jsonl").mkdir()  # It cannot be written.
        run.warned("lost here")
        Path("run/warnings.jsonl").rmdir()
    run.warned("after it is closed")
    assert not Path("run/warnings.jsonl").exists()


def test_a_run_that_finished_no_step_leaves_no_warning() -> None:
    def start() -> None:
        with folder() as run:
            run.warned("odd")
            run.write("eval_before.json", {})
            raise ConfigError("no")

    with pytest.raises(ConfigError):
        start()
    assert not Path("run").exists()
