"""`dppo train` and `dppo eval` in several processes: whole commands, real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import read_json, read_lines, train_words, write_rewards
from safetensors.torch import load_file

from dppo_cli.cli.main import main

WORDS = ("adapter.dropout=0.1", "anchor=recompute", "approx=topk", "checkpoint.every=1", "console=quiet")
"""With all random numbers and reports that there are. Dropout differs between numbers of processes."""


def numbers(run: str | Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    return [
        {k: v for k, v in row.items() if k not in ("time", "memory")} for row in read_lines(Path(run, "metrics.jsonl"))
    ]


def train(*words: str) -> int:
    return main(["train", *words])


def test_two_processes_give_what_one_gives(work: Path, model: Path) -> None:
    words = train_words(model, "approx=topk", "kl_to_reference=0.1", "eval.every=1", "console=quiet")
    assert train(*words, "run_dir=one") == train(*words, "run_dir=two", "hardware.processes=2") == 0
    for a, b in zip(numbers("two"), numbers("one"), strict=True):
        assert a.keys() == b.keys()
        for key in ("reward", "gradient_norm", "shift_mean", "entropy", "divergence_p90", "reference_kl"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-7), key
        assert a.get("eval_accuracy") == b.get("eval_accuracy")
    one, two = (load_file(f"{run}/adapter/adapter_model.safetensors") for run in ("one", "two"))
    assert all(float((one[name] - two[name]).abs().max()) < 1e-4 for name in one)
    samples = [
        [(row["token_ids"], row["score"]) for row in read_lines(Path(run, "samples/step-2.jsonl"))]
        for run in ("one", "two")
    ]
    assert samples[0] == samples[1]
    summary = read_json(Path("two/summary.json"))
    idle = "2 processes share the batch.prompts_per_update=1 groups of an update: some have nothing to do"
    assert idle in summary["warnings"] and len(summary["warnings"]) == len(set(summary["warnings"]))
    assert summary["system"]["sampled from"].endswith("; in 2 processes")
    assert summary["eval_before"] == read_json(Path("one/summary.json"))["eval_before"]

    assert main(["eval", "run=one", "out=a"]) == main(["eval", "run=one", "out=b", "hardware.processes=2"]) == 0
    assert read_lines(Path("a/samples.jsonl")) == read_lines(Path("b/samples.jsonl"))


@pytest.fixture(scope="module")
def whole(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes with all that is random, which nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    write_rewards(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(*train_words(tiny_models["llama3"], *WORDS, "hardware.processes=2", "run_dir=run", "steps=4")) == 0
    return folder / "run"


def test_a_resume_is_exact_and_may_have_another_number_of_processes(work: Path, model: Path, whole: Path) -> None:
    assert train(*train_words(model, *WORDS, "hardware.processes=2", "run_dir=parts", "steps=2")) == 0
    assert train("resume=parts", "steps=4") == 0
    assert numbers("parts") == numbers(whole)
    adapter = "adapter/adapter_model.safetensors"
    assert Path("parts", adapter).read_bytes() == Path(whole, adapter).read_bytes()
    assert train("resume=parts", "steps=5", "hardware.processes=1") == 0
    assert len(numbers("parts")) == 5 and numbers("parts")[:4] == numbers(whole)
    assert read_json(Path("parts/summary.json"))["resumes"][-1]["changes"]["hardware.processes"] == [2, 1]


def test_a_launcher(work: Path, model: Path, whole: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dppo_cli"]
    words = train_words(model, *WORDS, "run_dir=run", "steps=2")
    done = subprocess.run([*launcher, "train", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert numbers("run") == numbers(whole)[:2], "as if it had been started here"
    assert done.stdout.count("accuracy before") == 1, "one process speaks"
    assert train("resume=run", "steps=4") == 0
    assert numbers("run") == numbers(whole), "a resume knows how many there were"
    assert read_json(Path("run/summary.json"))["resumes"][-1]["changes"] == {"steps": [2, 4]}


def test_what_a_launcher_cannot_share(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert main(["eval", "run=runs/last"]) == 2
    expected = "which has started 4 processes; start it by itself, with hardware.processes=4\n"
    assert capsys.readouterr().err == f"dppo: dppo eval does not work under a launcher, {expected}"
    assert main(["train", "-m", "seed=1,2"]) == 2
    assert "a sweep (-m) does not work under a launcher" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit):
        main(["eval", "run=runs/last"])
    assert capsys.readouterr().err == ""


def test_the_whole_distribution_stays_in_one_process(work: Path, model: Path, capsys) -> None:
    assert train(*train_words(model, "approx=full", "hardware.processes=2")) == 2
    assert "approx=full needs the sampler's whole distribution" in capsys.readouterr().err
    assert train(*train_words(model, "hardware.processes=0")) == 2
    assert "processes >= 1" in capsys.readouterr().err


@pytest.mark.parametrize("whom", ["the worker", "the main process"])
def test_a_process_that_is_killed(work: Path, model: Path, whom: str) -> None:
    """The run is saved if the main process lives; the worker ends if it does not."""
    command = [
        sys.executable,
        "-m",
        "dppo_cli",
        "train",
        *train_words(model, "steps=2000", "run_dir=run", "hardware.processes=2"),
    ]
    with open("errors", "w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
    metrics = Path("run/metrics.jsonl")
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (worker,) = [int(pid) for pid in children if "processes.worker" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(worker if whom == "the worker" else process.pid, signal.SIGKILL)
    status = process.wait(60)
    wait_until(lambda: not Path(f"/proc/{worker}/cmdline").exists())
    if whom == "the worker":
        assert status == 2
        text = Path("errors").read_text()
        assert "dppo: process 2 of 2 has ended: SIGKILL; the state after step" in text and "resume=run" in text
        steps = json.loads(Path("run/summary.json").read_text())["steps"]
        assert steps == len(numbers("run")) >= 2 and Path(f"run/checkpoints/step-{steps}").is_dir()


def wait_until(true: Any) -> None:
    ends = time.monotonic() + 60
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)
