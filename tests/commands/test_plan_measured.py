"""The estimate next to the peak that a run reports, each in a process of its own, because both are of a process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from helpers import read_json, write_rewards

SMOLLM2 = Path(os.environ.get("DPPO_SMOLLM2", Path(__file__).parents[2] / "benchmarks/build/smollm2"))
TOLERANCE = 0.2


def planned_and_measured(folder: Path, *words: str) -> tuple[float, float]:
    """GiB."""
    done = run("plan", "json=true", *words, folder=folder)
    planned = json.loads(done.stdout)["peak_memory_gib"]
    run("train", f"run_dir={folder / 'run'}", *words, folder=folder)
    return planned, read_json(folder / "run" / "summary.json")["peak_memory_gib"]


def run(command: str, *words: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    call = [sys.executable, "-m", "dppo_cli", command, *words]
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_the_default_run(tmp_path: Path) -> None:
    planned, measured = planned_and_measured(tmp_path, "hardware=cpu", "steps=1", "data.eval_problems=8")
    print(f"planned {planned:.3f} GiB, measured {measured:.3f} GiB")
    assert planned == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_a_tiny_model_with_a_large_vocabulary(adapter: str, tmp_path: Path) -> None:
    """Logits and head make the peak."""
    write_rewards(tmp_path)
    folder = tiny.save(tmp_path / "m", vocabulary=100_000)
    words = ("model=hf", f"model.path={folder}", "hardware=cpu", f"adapter={adapter}", "batch=small", "steps=1")
    words += ("reward=function", "reward.path=rewards.py:late", "data.eval_problems=8", "batch.prompts_per_step=16")
    words += ("batch.prompts_per_update=16", "sampling.max_new_tokens=16")
    planned, measured = planned_and_measured(tmp_path, *words)
    print(f"planned {planned:.3f} GiB, measured {measured:.3f} GiB")
    assert planned == pytest.approx(measured, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM2.is_dir(), reason=f"no SmolLM2-135M in {SMOLLM2}; set DPPO_SMOLLM2 to its folder")
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_smollm2(adapter: str, checkpointing: str, tmp_path: Path) -> None:
    write_rewards(tmp_path)
    words = ("model=hf", f"model.path={SMOLLM2}", "hardware=cpu", f"adapter={adapter}", "batch=small", "steps=1")
    words += ("reward=function", "reward.path=rewards.py:late", "data.eval_problems=8", "batch.prompts_per_step=8")
    words += ("batch.prompts_per_update=8", "sampling.max_new_tokens=64", "hardware.tokens_per_micro_batch=512")
    planned, measured = planned_and_measured(tmp_path, *words, f"hardware.gradient_checkpointing={checkpointing}")
    print(f"planned {planned:.3f} GiB, measured {measured:.3f} GiB")
    assert planned == pytest.approx(measured, rel=TOLERANCE)
