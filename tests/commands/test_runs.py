"""`dppo runs`: what it finds, what it says of each run, and that no folder is too broken to be listed."""

import fcntl
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import train

from dppo_cli.cli.main import main
from dppo_cli.telemetry.table import age, size

CONFIG = """\
steps: 8
model: {path: some/model}
objective: {_target_: dppo_cli.algorithm.objective.DPPO}
divergence: {_target_: dppo_cli.algorithm.divergence.KL}
approx: {_target_: dppo_cli.algorithm.approx.TopK, k: 20}
advantage: {_target_: dppo_cli.algorithm.advantage.GroupStd}
adapter: {r: 16, quantization: nf4, use_dora: false}
"""
SUMMARY = {"steps": 8, "interrupted": False, "eval_before": 0.25, "eval_after": 0.75}


def make_run(path: Path, steps: int = 3, summary: dict[str, Any] | None = None, minutes: int = 0) -> Path:
    """A run folder that was written so many minutes ago."""
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(CONFIG)
    (path / "metrics.jsonl").write_text("".join(f'{{"step": {n}, "reward": 0.5}}\n' for n in range(1, steps + 1)))
    if summary is not None:
        (path / "summary.json").write_text(json.dumps(summary))
    (path / ".lock").touch()
    then = time.time() - 60 * minutes
    for file in path.iterdir():
        os.utime(file, (then, then))
    return path


def listed(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main(["runs", *words, "json=true"]) == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["runs"]
    return found


@pytest.mark.parametrize(
    ("width", "last", "wrapped"),
    [(200, "method", False), (110, "model", False), (60, "accuracy", False), (40, "step", False), (20, "step", True)],
)
def test_a_narrow_terminal_has_fewer_columns(
    width: int,
    last: str,
    wrapped: bool,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Names and states stay whole for as long as there is room for them and the steps; reasons are folded."""
    make_run(work / "runs/2026-11-27", 8, SUMMARY)
    make_run(work / "runs/broken", 8).joinpath("config.yaml").write_text("{")
    monkeypatch.setattr("dppo_cli.commands.runs_table.RichConsole.is_terminal", True)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["runs"]) == 0
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    lines = [line for line in shown.splitlines() if "┃" in line]
    assert all(len(line) <= width for line in shown.splitlines())
    assert wrapped or lines[0].split("┃")[-2].strip() == last
    assert ("runs/2026-11-27 " in shown and "finished" in shown and "8 of 8" in shown) is not wrapped
    assert "damaged" in shown or wrapped


def test_a_real_run(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, "steps=1", "run_dir=runs/mine") == 0
    (row,) = listed(capsys)
    assert (row["run"], row["state"], row["step"], row["steps"]) == ("runs/mine", "finished", 1, 1)
    assert row["model"] == str(model) and row["method"] == "DPPO TotalVariation Binary GroupMean LoRA r=4"
    files = [p for p in (work / "runs/mine").rglob("*") if p.is_file()]
    assert row["bytes"] == sum(p.stat().st_size for p in files)
    assert row["problem"] is None


def test_the_newest_comes_first_and_links_name_nothing_twice(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, minutes in (("old", 90), ("new", 1), ("middle", 30)):
        make_run(work / "runs" / name, summary=SUMMARY, minutes=minutes)
    (work / "runs/last").symlink_to("new")
    make_run(work / "runs/sweep/0", summary=SUMMARY, minutes=10)
    make_run(work / "runs/sweep/1", summary=SUMMARY, minutes=20)
    names = ["runs/new", "runs/sweep/0", "runs/sweep/1", "runs/middle", "runs/old"]
    assert [row["run"] for row in listed(capsys)] == names
    assert [row["run"] for row in listed(capsys, "limit=2")] == names[:2]
    assert [row["run"] for row in listed(capsys, "folder=runs/sweep")] == names[1:3]
    assert [row["run"] for row in listed(capsys, "folder=runs/last")] == ["runs/last"]


def test_states(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(work / "runs/finished", summary=SUMMARY, minutes=1)
    make_run(work / "runs/stopped", summary={**SUMMARY, "steps": 5, "interrupted": True, "eval_after": None}, minutes=2)
    make_run(work / "runs/killed", steps=4, minutes=3)
    running = make_run(work / "runs/running", steps=2, minutes=4)
    (work / "runs/failed").mkdir()
    (work / "runs/failed/job.json").write_text('{"status": 2, "error": "data.path is not set\\nmore"}')
    os.utime(work / "runs/failed/job.json", (0, 0))
    for run, accuracy in ((running, 0.5), (work / "runs/killed", 0.125)):
        for n in (2, 10):
            (run / f"checkpoints/step-{n}").mkdir(parents=True)
            state = {"before": {"held_out": {"accuracy": accuracy * (n == 10)}}}
            (run / f"checkpoints/step-{n}/state.json").write_text(json.dumps(state))
    with (running / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = listed(capsys)
    found = {r["state"]: (r["run"], r["step"], r["steps"], r["accuracy_before"], r["accuracy_after"]) for r in rows}
    assert found == {
        "finished": ("runs/finished", 8, 8, 0.25, 0.75),
        "stopped": ("runs/stopped", 5, 8, 0.25, None),
        "killed": ("runs/killed", 4, 8, 0.125, None),
        "running": ("runs/running", 2, 8, 0.5, None),
        "failed": ("runs/failed", None, None, None, None),
    }
    assert rows[-1]["problem"] == "data.path is not set"
    # Once the process is gone, the run is one that was killed.
    assert [row["state"] for row in listed(capsys)].count("killed") == 2


def test_the_table(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(work / "runs/[red]odd[/red]", summary=SUMMARY, minutes=180)
    make_run(work / "runs/more", minutes=200)
    assert main(["runs", "limit=1"]) == 0
    output = capsys.readouterr().out
    (line,) = [line for line in output.splitlines() if "odd" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")] == [
        "runs/[red]odd[/red]",
        "finished",
        "8 of 8",
        "25.0% -> 75.0%",
        "3 h",
        "0.0 MiB",
        "some/model",
        "DPPO KL TopK 20 GroupStd QLoRA r=16",
    ]
    assert "1 of 2 runs; limit=null shows all" in output


def test_a_region_and_a_filter_are_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(work / "runs/more", summary=SUMMARY)
    parts = (
        "region: {_target_: dppo_cli.algorithm.region.PrefixBudget}\n"
        "filter: {_target_: dppo_cli.algorithm.filters.Band, statistic: k3, scope: token}\n"
    )
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + parts)
    (row,) = listed(capsys)
    assert row["method"] == "DPPO KL TopK 20 GroupStd PrefixBudget Band k3 token QLoRA r=16"


def test_what_is_known_of_the_accuracy(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first evaluation is there before the first checkpoint."""
    make_run(work / "runs/new")
    started = make_run(work / "runs/started")
    (started / "eval_before.json").write_text('{"held_out": {"accuracy": 0.25}}')
    assert {row["run"]: row["accuracy_before"] for row in listed(capsys)} == {"runs/new": None, "runs/started": 0.25}
    assert main(["runs"]) == 0
    lines = {line.split()[1]: line.split("│") for line in capsys.readouterr().out.splitlines() if "killed" in line}
    assert lines["runs/new"][4].strip() == "-" and lines["runs/started"][4].strip() == "25.0% -> -"


BROKEN = {
    "no config": ("config.yaml", None, "config.yaml is missing"),
    "config is no YAML": ("config.yaml", b"a: [", "config.yaml is damaged"),
    "config is a list": ("config.yaml", b"[1]", "config.yaml is damaged"),
    "config is no text": ("config.yaml", b"\xff\xfe\x00", "config.yaml is damaged"),
    "config is huge": ("config.yaml", b"a: " + b"x" * 2**18, "config.yaml is too long"),
    "config is deep": ("config.yaml", b"[" * 20000, "config.yaml is damaged"),
    "summary is cut": ("summary.json", b'{"steps": 3', "summary.json is damaged"),
    "summary is a number": ("summary.json", b"3", "summary.json is damaged"),
    "summary is deep": ("summary.json", b"[" * 20000, "summary.json is damaged"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_run_is_a_row_that_says_why(kind: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, content, says = BROKEN[kind]
    path = make_run(work / "runs/broken", summary=SUMMARY) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    make_run(work / "runs/whole", summary=SUMMARY)
    rows = {row["run"]: row for row in listed(capsys)}
    assert (rows["runs/broken"]["state"], rows["runs/broken"]["problem"]) == ("broken", says)
    assert rows["runs/whole"]["state"] == "finished"


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"{", b'{"step": 1}\n{"step": 2', b"\xff\n", b"[]\n", b'{"step": "x"}\n']
)
def test_metrics_that_are_cut_or_damaged(content: bytes, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (make_run(work / "runs/a") / "metrics.jsonl").write_bytes(content)
    (row,) = listed(capsys)
    assert row["step"] == (1 if b"1" in content else None) and row["state"] == "killed"


def test_values_of_wrong_kinds(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(work / "runs/a", summary={"steps": "x", "eval_before": [1], "eval_after": 1e999})
    (path / "config.yaml").write_text('steps: {}\nmodel: 3\nobjective: [1]\nadapter: {r: "[red]"}\n')
    (row,) = listed(capsys)
    assert (row["step"], row["steps"], row["accuracy_before"], row["accuracy_after"]) == (3, None, None, None)
    assert main(["runs"]) == 0
    assert "LoRA r=[red]" in capsys.readouterr().out


def test_what_is_no_run_is_not_listed(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "runs/evals/monday").mkdir(parents=True)
    (work / "runs/evals/monday/config.yaml").write_text("run: null\n")
    (work / "runs/.hidden").mkdir()
    (work / "runs/.hidden/metrics.jsonl").touch()
    assert listed(capsys) == []
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "there are no runs in runs\n"


def test_mistakes(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        ([], "folder=runs is not a folder; `dppo train` makes it"),
        (["folder=nowhere"], "folder=nowhere is not a folder"),
        (["limit=0"], "limit=0 breaks the rule"),
    ):
        assert main(["runs", *words]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_it_needs_no_torch(work: Path) -> None:
    make_run(work / "runs/a", summary=SUMMARY)
    code = "import sys; from dppo_cli.cli.main import main; main(['runs']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=work, capture_output=True).returncode == 0


def test_ages_and_sizes() -> None:
    assert [age(n) for n in (-1, 59, 119, 121, 7100, 7200, 86400 * 3)] == [
        "0 s",
        "59 s",
        "119 s",
        "2 min",
        "118 min",
        "2 h",
        "3 days",
    ]
    assert [size(n) for n in (0, 2**20, 3 * 2**30)] == ["0.0 MiB", "1.0 MiB", "3.0 GiB"]
