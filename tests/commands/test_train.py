"""`dppo train` from end to end, on tiny random models: what a run leaves, and that equal commands leave the same."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import composed, read_json, read_lines, train
from omegaconf import OmegaConf
from safetensors.torch import load_file

from dppo_cli.cli.main import main
from dppo_cli.commands.trained import read_run_config
from dppo_cli.training.evaluation import EvalResult, evaluate
from dppo_cli.training.metrics import COST

WEIGHTS = "adapter/adapter_model.safetensors"

pytestmark = pytest.mark.usefixtures("work")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in COST} for row in rows]


# What a run leaves


def test_a_run_folder_holds_what_it_promises(model: Path, work: Path) -> None:
    assert train(model, "steps=3", "checkpoint.every=1", "checkpoint.keep=3", "eval.every=2", "run_dir=run") == 0
    run = work / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        ".lock",
        "adapter",
        "checkpoints",
        "config.yaml",
        "eval_before.json",
        "masked_by_mu.json",
        "masked_tokens.json",
        "metrics.jsonl",
        "samples",
        "summary.json",
    ]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-1", "step-2", "step-3"]
    for folder in (run / "checkpoints").iterdir():
        assert {p.name for p in folder.iterdir()} == {"adapter", "manifest.json", "state.json", "state.safetensors"}
    for folder in (run / "adapter", *run.glob("checkpoints/*/adapter")):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in folder.iterdir()}
    # No pickle anywhere.
    assert not list(run.rglob("*.bin"))

    config = OmegaConf.load(run / "config.yaml")
    assert (config.steps, config.adapter.r, config.reward.path) == (3, 4, f"{work}/rewards.py:late")

    summary = read_json(run / "summary.json")
    assert set(summary) >= {"eval_before", "eval_after", "steps", "seconds", "peak_memory_gib"}
    assert (summary["steps"], summary["interrupted"]) == (3, False)
    assert 0 <= summary["eval_before"] <= 1 and 0 <= summary["eval_after"] <= 1
    assert 0 < summary["seconds"] < 600 and 0.01 < summary["peak_memory_gib"] < 64
    # Rank 4 on 4 + 3 linear layers of 2 blocks: attention 32x32 (q, o), 32x16 (k, v), MLP 32x64.
    assert summary["trained_parameters"] == 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert (summary["run_dir"], summary["adapter"]) == ("run", "run/adapter")

    metrics = read_lines(run / "metrics.jsonl")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert ["eval_accuracy" in row for row in metrics] == [False, True, False]


def test_every_metric_is_finite_and_in_its_range(model: Path, work: Path) -> None:
    assert train(model, "steps=2", "batch.prompts_per_step=4", "optim.lr=0.01", "run_dir=run") == 0
    for row in read_lines(work / "run/metrics.jsonl"):
        time = row.pop("time")
        memory = row.pop("memory")
        assert row.pop("reward_parts") == {}
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values())
        for name in ("reward", "accuracy", "equal_groups", "finished", "skipped", "padding", "unjudged"):
            assert 0 <= row[name] <= 1, name
        for name in ("shift_mean", "shift_max", "masked_positive", "masked_negative", "divergence_p50"):
            assert 0 <= row[name] <= 1, name
        assert 1 <= row["response_tokens"] <= row["response_tokens_max"] <= 4
        assert 0 < row["entropy"] < math.log(96)
        assert row["divergence_p50"] <= row["divergence_p90"] <= row["divergence_p99"] <= row["divergence_p100"]
        assert row["ratio_p1"] <= row["ratio_p50"] <= row["ratio_p100"]
        # In float32 on one machine, sampler and trainer disagree by rounding only, and binary TV is |pi - mu|.
        assert row["mismatch_mean"] < 1e-5
        assert row["divergence_p100"] == pytest.approx(row["shift_max"], abs=1e-6)
        assert row["gradient_norm"] > 0 and row["lr"] == 0.01
        phases = [time[name] for name in ("rollout", "reward", "update", "sync")]
        assert min(phases) >= 0 and sum(phases) <= time["total"] + 1e-6
        assert 0.01 < memory["process_gib"] <= memory["process_peak_gib"] < 64
        assert time["rollout_tokens_per_second"] > time["tokens_per_second"] > 0


def test_the_last_checkpoint_is_the_adapter(model: Path, work: Path) -> None:
    assert train(model, "steps=4", "checkpoint.every=2", "run_dir=run") == 0
    last, before = (work / f"run/checkpoints/step-{n}/{WEIGHTS}" for n in (4, 2))
    assert last.read_bytes() == (work / "run" / WEIGHTS).read_bytes()
    assert before.read_bytes() != last.read_bytes()


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], [5]),
        (["checkpoint.every=0"], [5]),
        (["checkpoint.every=2"], [4, 5]),
        (["checkpoint.every=1", "checkpoint.keep=3"], [3, 4, 5]),
    ],
)
def test_when_the_state_is_saved(words: list[str], steps: list[int], model: Path, work: Path) -> None:
    """In any case at the end; steps=5 is less than the default of checkpoint.every."""
    assert train(model, *words, "steps=5", "run_dir=run") == 0
    assert {p.name for p in (work / "run/checkpoints").iterdir()} == {f"step-{step}" for step in steps}


def test_the_best_by_evaluation_is_kept(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where no checkpoint is due; a later one that is as good does not take its place."""
    accuracies = iter([0.9, 0.1, 0.5, 0.5, 0.4, 0.8])  # before, after steps 1 to 4, and at the end

    def evaluated(*_: Any) -> EvalResult:
        result = evaluate(*_)
        monkeypatch.setattr(EvalResult, "accuracy", next(accuracies))
        return result

    monkeypatch.setattr("dppo_cli.training.evaluation.evaluate", evaluated)
    words = ["steps=5", "eval.every=1", "checkpoint.every=0", "checkpoint.keep=1", "run_dir=run"]
    assert train(model, *words) == 0
    assert {p.name for p in (work / "run/checkpoints").iterdir()} == {"step-2", "step-5"}
    assert read_json(work / "run/checkpoints/step-5/state.json")["best"] == [2, 0.5]


def test_the_saved_adapter_is_float32_and_has_moved(model: Path, work: Path) -> None:
    assert train(model, "run_dir=run") == 0
    tensors = load_file(work / "run" / WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    # B starts at zero, so what is in it was learnt.
    assert all(t.abs().max() > 0 for name, t in tensors.items() if "lora_B" in name)


def test_runs_last_points_at_the_newest(model: Path, work: Path) -> None:
    assert train(model, "steps=1") == 0
    (first,) = [p for p in (work / "runs").iterdir() if p.name != "last"]
    assert (work / "runs/last").resolve() == first
    assert train(model, "steps=1", "run_dir=elsewhere/run") == 0
    assert (work / "runs/last").resolve() == work / "elsewhere/run"
    assert read_json(work / "runs/last/summary.json")["run_dir"] == "elsewhere/run"


def test_the_config_file_of_a_run_rebuilds_the_same_config(model: Path, work: Path) -> None:
    assert train(model, "steps=1", "run_dir=run", "approx=topk", "approx.k=3") == 0
    config = read_run_config(work / "run")
    assert config.approx.num_logprobs == 3 and config.steps == 1 and config.run_dir == "run"
    assert composed("train").optim.keys() == OmegaConf.load(work / "run/config.yaml").optim.keys()


# Seeds


def test_equal_commands_give_equal_runs(model: Path, work: Path) -> None:
    for run in ("one", "two"):
        assert train(model, "steps=3", f"run_dir={run}", "eval.every=1", "checkpoint.every=3") == 0
    one, two = (without_times(read_lines(work / run / "metrics.jsonl")) for run in ("one", "two"))
    # As text, which is to say in every bit.
    assert json.dumps(one) == json.dumps(two)
    assert (work / "one" / WEIGHTS).read_bytes() == (work / "two" / WEIGHTS).read_bytes()
    assert (work / "one/masked_tokens.json").read_text() == (work / "two/masked_tokens.json").read_text()
    one, two = (work / run / "checkpoints/step-3/state.safetensors" for run in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_equal_commands_give_equal_runs_with_the_default_model(work: Path) -> None:
    """Large enough for sums to be split over threads, whose order must not show."""
    for run in ("one", "two"):
        assert main(["train", "steps=4", "data.eval_problems=4", f"run_dir={run}"]) == 0
    one, two = (without_times(read_lines(work / run / "metrics.jsonl")) for run in ("one", "two"))
    assert json.dumps(one) == json.dumps(two)
    assert (work / "one" / WEIGHTS).read_bytes() == (work / "two" / WEIGHTS).read_bytes()


def test_another_seed_gives_another_run(model: Path, work: Path) -> None:
    # One problem, so the order of problems is the same; and an untouched adapter has no effect on the first samples.
    for seed in (1, 2):
        assert train(model, "steps=1", f"seed={seed}", "data.train_problems=1", f"run_dir=run{seed}") == 0
    one, two = (read_lines(work / f"run{seed}/metrics.jsonl")[0] for seed in (1, 2))
    assert one["reward"] != two["reward"] and one["entropy"] != two["entropy"]


def test_metrics_do_not_depend_on_how_a_batch_is_cut(model: Path, work: Path) -> None:
    """A budget of 1 token makes every sequence a micro-batch of its own."""
    for name, budget in (("whole", 8192), ("cut", 1)):
        assert train(model, "steps=1", f"hardware.tokens_per_micro_batch={budget}", f"run_dir={name}") == 0
    whole, cut = (load_file(work / name / WEIGHTS) for name in ("whole", "cut"))
    one, other = (read_lines(work / name / "metrics.jsonl")[0] for name in ("whole", "cut"))
    assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4)
    assert all(torch.allclose(whole[key], cut[key], atol=1e-5) for key in whole)
