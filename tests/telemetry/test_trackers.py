"""What trackers are given, in which order, and that none can hurt a run: TensorBoard for real, the others by a fake."""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from dppo_cli.telemetry import trackers
from dppo_cli.telemetry.listeners import Listeners
from dppo_cli.telemetry.trackers import Tracker, flat
from dppo_cli.types import EvalReport, RunInfo, StepReport

CONFIG = "seed: 1\nrun_dir: null\nsampling:\n  temperature: 0.5\n  stop: [x, z]\nmodel:\n  path: ${oc.env:MY_MODEL}\n"
EVALUATION = EvalReport(0, "held_out", 0.25, 0.125, (0.0, 0.5), [])


@pytest.fixture
def run(tmp_path: Path) -> RunInfo:
    """A run as it starts, in a folder that has its config."""
    folder = tmp_path / "runs/monday"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    return RunInfo(folder, 0, 3, "some/model", 10, 2, "cpu", "float32", "merged weights")


def step(number: int, **more: Any) -> StepReport:
    metrics = {"step": number, "reward": number / 4, "lr": None, "time": {"rollout": 1.5, "total": 2}, **more}
    return StepReport(metrics, [], [])


class Fake:
    """One of Accelerate's trackers: remembers how it was made and what it was told, and fails where it is told to."""

    made: ClassVar[list["Fake"]] = []
    uris: ClassVar[list[str]] = []
    fails_at: str | None = None
    error: BaseException = OSError("no network")

    def __init__(self, *words: Any, **options: Any) -> None:
        self.words, self.options, self.told = words, options, []
        self.tracker = SimpleNamespace(info=SimpleNamespace(run_id="an-id"))
        Fake.made.append(self)

    def tell(self, what: str, said: Any = None) -> None:
        print(f"{what} of a tracker")
        self.told.append((what, said))
        if what == Fake.fails_at:
            raise Fake.error

    def start(self) -> None:
        self.tell("start")

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        self.tell("config", dict(values))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.tell("log", (dict(values), step))

    def finish(self) -> None:
        self.tell("finish")

    def logged(self) -> list[Any]:
        return [said for what, said in self.told if what == "log"]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    for name in ("WandBTracker", "MLflowTracker", "TrackioTracker"):
        monkeypatch.setattr(trackers, name, Fake)
    monkeypatch.setattr(Fake, "made", [])
    monkeypatch.setattr(Fake, "fails_at", None)
    monkeypatch.setattr(Fake, "error", OSError("no network"))
    for name in ("WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Fake, "uris", [])
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(set_tracking_uri=Fake.uris.append))
    return Fake


def test_numbers_by_their_path() -> None:
    assert flat({"a": 1, "b": None, "time": {"rollout": 1.5, "more": {"x": 2}}, "name": "text", "list": [1]}) == {
        "a": 1,
        "time/rollout": 1.5,
        "time/more/x": 2,
    }


# TensorBoard, read back by its own reader


def read(run: RunInfo) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator

    found = EventAccumulator(str(run.run_dir / "trackers/tensorboard"), size_guidance={TENSORS: 0})
    return found.Reload()


def scalars(run: RunInfo, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read(run).Scalars(tag)]


def texts(run: RunInfo, tag: str) -> list[tuple[int, str]]:
    events = read(run).Tensors(f"{tag}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in events]


def test_tensorboard_has_everything_a_run_says(run: RunInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_MODEL", "hidden/away")
    listening = Tracker("tensorboard", CONFIG)
    listening.started(run)
    listening.evaluated(EVALUATION)
    listening.stepped(step(1))
    listening.warned("step 1: look at hidden/away")
    listening.stepped(step(2))
    listening.evaluated(replace(EVALUATION, step=2, name="math", accuracy=0.75, standard_error=None))
    listening.finished({})
    assert scalars(run, "reward") == [(1, 0.25), (2, 0.5)]
    assert scalars(run, "time/rollout") == [(1, 1.5), (2, 1.5)]
    assert scalars(run, "eval/held_out/accuracy") == [(0, 0.25)]
    assert scalars(run, "eval/held_out/standard_error") == [(0, 0.125)]
    assert scalars(run, "eval/math/accuracy") == [(2, 0.75)]
    assert not {"step", "lr", "eval/math/standard_error"} & set(read(run).Tags()["scalars"])
    assert texts(run, "warning") == [(1, "step 1: look at $MY_MODEL")]
    assert texts(run, "config") == [(0, f"```yaml\n{CONFIG}\n```")]
    assert sorted(p.name for p in (run.run_dir / "trackers").iterdir()) == ["runs.json", "tensorboard"]


def test_a_resumed_run_has_no_step_twice_in_tensorboard(run: RunInfo) -> None:
    """The first process was killed at step 4, two steps after its last checkpoint."""
    first = Tracker("tensorboard", CONFIG)
    first.started(run)
    for number in (1, 2, 3, 4):
        first.stepped(step(number))
    second = Tracker("tensorboard", CONFIG)
    second.started(replace(run, step=2))
    for number in (3, 4, 5):
        second.stepped(step(number, reward=9.0))
    second.finished({})
    assert scalars(run, "reward") == [(1, 0.25), (2, 0.5), (3, 9.0), (4, 9.0), (5, 9.0)]
    assert len(texts(run, "config")) == 1


# The others


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_others_are_told_the_same(
    name: str, run: RunInfo, fake: type[Fake], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_MODEL", "hidden/away")
    listening = Tracker(name, CONFIG)
    listening.started(run)
    listening.evaluated(EVALUATION)
    listening.stepped(step(1))
    listening.warned("hidden/away is odd")
    listening.finished(None)
    (made,) = fake.made
    assert made.told[:2] == [
        ("start", None),
        (
            "config",
            {
                "seed": 1,
                "run_dir": None,
                "sampling/temperature": 0.5,
                "sampling/stop": '["x", "z"]',
                "model/path": "${oc.env:MY_MODEL}",
            },
        ),
    ]
    evaluation = {"eval/held_out/accuracy": 0.25, "eval/held_out/standard_error": 0.125}
    metrics = {"reward": 0.25, "time/rollout": 1.5, "time/total": 2}
    warning = [({"warning": "$MY_MODEL is odd"}, 1)] if name == "wandb" else []
    assert made.logged() == [(evaluation, 0), (metrics, 1), *warning]
    assert made.told[-1] == ("finish", None)
    # What a tracker prints is not the run's output.
    captured = capsys.readouterr()
    assert captured.out == "" and "start of a tracker" in captured.err


def test_where_and_as_what_they_start(run: RunInfo, fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run.run_dir / "trackers"
    for name in ("wandb", "mlflow", "trackio"):
        Tracker(name, CONFIG).started(run)
    wandb, mlflow, trackio = fake.made
    assert wandb.words == ("dppo",) and wandb.options["settings"] == {"console": "off"}
    assert (wandb.options["dir"], wandb.options["name"]) == (str(folder), "runs/monday")
    assert mlflow.words == ("dppo",) and mlflow.options["run_id"] is None
    assert mlflow.options["logging_dir"] == (folder / "mlflow").as_uri()
    assert fake.uris == [f"sqlite:///{folder / 'mlflow.db'}"]
    assert trackio.options["name"].startswith("runs/monday ")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://localhost:5000")
    Tracker("wandb", CONFIG).started(run)
    Tracker("mlflow", CONFIG).started(run)
    assert fake.made[-2].words == ("mine",)
    assert fake.made[-1].options["logging_dir"] is None and len(fake.uris) == 1


def test_a_resume_goes_on_with_the_same_run(run: RunInfo, fake: type[Fake]) -> None:
    names = ("wandb", "mlflow", "trackio")
    for name in names * 2:
        Tracker(name, CONFIG).started(run)
    before, after = dict(zip(names, fake.made[:3], strict=True)), dict(zip(names, fake.made[3:], strict=True))
    assert after["wandb"].options["id"] == before["wandb"].options["id"]
    assert after["mlflow"].options["run_id"] == "an-id"
    assert after["trackio"].options["name"] == before["trackio"].options["name"]
    assert after["wandb"].options["resume"] == after["trackio"].options["resume"] == "allow"
    # Its config is there already; MLflow would refuse what has changed.
    assert [made.told for made in after.values()] == [[("start", None)]] * 3


def test_a_title_has_no_value_of_the_environment(
    run: RunInfo, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PLACE", str(run.run_dir))
    Tracker("wandb", CONFIG.replace("run_dir: null", "run_dir: ${oc.env:MY_PLACE}")).started(run)
    assert fake.made[0].options["name"] == "${oc.env:MY_PLACE}"


# Failures


@pytest.mark.parametrize("moment", ["start", "config", "log", "finish"])
@pytest.mark.parametrize(
    "error", [OSError("no network\nat all"), SystemExit("no network")], ids=lambda e: type(e).__name__
)
def test_a_failure_is_said_once_and_hurts_nobody(
    moment: str, error: BaseException, run: RunInfo, fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake, "fails_at", moment)
    monkeypatch.setattr(fake, "error", error)
    heard: list[str] = []
    listeners = Listeners([Tracker("wandb", CONFIG)], heard.append)
    listeners.started(run)
    listeners.evaluated(EVALUATION)
    for number in (1, 2):
        listeners.stepped(step(number))
    listeners.warned("careful")
    listeners.finished({})
    text = f"Tracker failed and is switched off: RuntimeError: tracker=wandb: {type(error).__name__}: no network"
    assert heard == [text]
    # It was told once more only that it is over, and not even that if it never began.
    told = [what for what, _ in fake.made[0].told]
    assert told.count(moment) == 1
    assert told.count("finish") == (0 if moment == "start" else 1)


def test_a_failure_tells_no_key(run: RunInfo, fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:hunter2@host")
    monkeypatch.setattr(fake, "fails_at", "start")
    monkeypatch.setattr(fake, "error", OSError("http://me:hunter2@host/api cannot be reached"))
    with pytest.raises(RuntimeError, match=r"OSError: \$MLFLOW_TRACKING_URI/api cannot be reached"):
        Tracker("mlflow", CONFIG).started(run)


def test_a_run_that_left_nothing_has_no_trackers_either(run: RunInfo, fake: type[Fake]) -> None:
    listening = Tracker("wandb", CONFIG)
    listening.started(run)
    assert json.loads((run.run_dir / "trackers/runs.json").read_text())["wandb"] == fake.made[0].options["id"]
    (run.run_dir / "config.yaml").unlink()
    listening.finished(None)
    assert list(run.run_dir.iterdir()) == []


@pytest.mark.parametrize("damage", ["", "[]", "{", "\udc80"])
def test_ids_that_cannot_be_read_are_made_anew(damage: str, run: RunInfo, fake: type[Fake]) -> None:
    (run.run_dir / "trackers").mkdir()
    (run.run_dir / "trackers/runs.json").write_bytes(damage.encode(errors="surrogateescape"))
    Tracker("wandb", CONFIG).started(run)
    assert len(fake.made[0].options["id"]) == 8
