"""What `console=plain`, `quiet` and `json` show, and what the panel shows of the whole run."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import pytest

from dppo_cli.telemetry import phases
from dppo_cli.telemetry.console import Console, JsonConsole, make_console
from dppo_cli.telemetry.progress import BARS
from dppo_cli.telemetry.table import RichConsole
from dppo_cli.telemetry.trust_region import MaskedTokens
from dppo_cli.types import EvalReport, Group, RunInfo, Score, StepReport

RUN = RunInfo(Path("runs/x"), 0, 6, "some/model", 20, 10, "cpu", "float32", "merged weights")
METRICS: dict[str, Any] = {
    **dict.fromkeys(("accuracy", "entropy", "shift_mean", "masked_positive", "masked_negative")),
    "skipped": 0.0,
    "padding": 0.0,
    "time": {"rollout": 1.0, "total": 4.0, "tokens_per_second": 100.0},
}
SUMMARY: dict[str, Any] = {"evaluations": {}, "steps": 6, "seconds": 12.0, "peak_memory_gib": 0.5, "adapter": "a"}


def console(mode: str) -> Any:
    return make_console(mode, MaskedTokens(text_of=str), 0)


def step(number: int) -> StepReport:
    return StepReport({**METRICS, "step": number, "reward": number / 8}, [], [])


def evaluation(accuracy: float, after: int) -> EvalReport:
    group = Group(make.prompt(), [make.completion()] * 2, [Score(1.0)] * 2)
    return EvalReport(after, "held_out", accuracy, 0.25, (0.125, 0.5), [group])


def tell(shown: Any) -> None:
    with shown.phase("loading the model"):
        pass
    shown.started(RUN)
    shown.evaluated(evaluation(0.25, 0))
    shown.stepped(step(1))
    shown.warned("careful")
    shown.finished(SUMMARY)


def test_quiet_is_warnings_and_the_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "LONG", 0.0)
    tell(console("quiet"))
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0] == "warning: careful" and lines[1].strip() == "train" and lines[2].startswith("┌")
    assert captured.err == ""


def test_json_is_an_object_for_each_event(capsys: pytest.CaptureFixture[str]) -> None:
    tell(console("json"))
    captured = capsys.readouterr()
    events = [json.loads(line) for line in captured.out.splitlines()]
    names = ["phase", "phase", "started", "evaluated", "stepped", "warned", "finished"]
    assert [event.pop("event") for event in events] == names
    begins, ends, started, evaluated, stepped, warned, finished = events
    assert begins == {"name": "loading the model", "state": "begins"}
    assert ends["state"] == "ends" and 0 <= ends["seconds"] < 60
    assert started["run_dir"] == "runs/x" and started["steps"] == 6 and started["device"] == "cpu"
    assert evaluated == {
        "step": 0,
        "name": "held_out",
        "accuracy": 0.25,
        "standard_error": 0.25,
        "interval": [0.125, 0.5],
        "samples": 2,
    }
    assert stepped == {"metrics": {**METRICS, "step": 1, "reward": 0.125}}
    assert (warned, finished) == ({"text": "careful"}, {"summary": SUMMARY})
    assert captured.err == ""


def test_a_reader_of_json_that_is_gone_ends_no_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Gone())
    done = False
    with JsonConsole().phase("loading"):
        done = True
    assert done


def test_plain_is_lines_in_a_terminal_too(terminal: io.StringIO) -> None:
    shown = console("plain")
    tell(shown)
    assert shown.live is None
    text = terminal.getvalue()
    assert "step 1/6  reward 0.125" in text and "left 0:00:20" in text and "\x1b" not in text


def drawn(shown: Console) -> str:
    screen = io.StringIO()
    RichConsole(file=screen, width=100, color_system=None).print(shown._panel())
    return screen.getvalue()


def test_the_panel_shows_the_run_so_far(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (6 * 2**30, 24 * 2**30))
    shown = console("auto")
    shown.started(replace(RUN, device="cuda:0"))
    shown.evaluated(evaluation(0.25, 0))
    shown.stepped(step(1))
    assert "held-out" not in drawn(shown) and BARS[0] not in drawn(shown)
    shown.evaluated(replace(evaluation(0.5, 1), name="math"))
    shown.stepped(step(2))
    shown.evaluated(evaluation(0.75, 2))
    text = drawn(shown)
    assert f"reward   {BARS[0]}{BARS[-1]} 0.125 -> 0.250" in text
    assert f"held-out {BARS[0]}{BARS[-1]} 0.250 -> 0.750" in text
    assert "GPU memory 18.0 of 24.0 GiB" in text
    shown.finished(None)


def test_the_panel_says_what_is_no_step(terminal: io.StringIO) -> None:
    shown = console("auto")
    with shown.phase("loading the model"):
        pass
    assert "loading the model" in terminal.getvalue()
    shown.started(RUN)
    with shown.phase("evaluating [before] training"):
        assert "evaluating [before] training ..." in drawn(shown)
    assert "evaluating" not in drawn(shown)
    shown.finished(None)
    assert "evaluating" not in drawn(shown)


def test_the_curve_of_a_run_that_goes_on_begins_at_its_begin(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n{"step": 2, "reward": 2.0}\n')
    shown = console("auto")
    shown.started(replace(RUN, run_dir=tmp_path, step=2))
    shown.stepped(step(3))
    assert shown.rewards == [1.0, 2.0, 0.375]
