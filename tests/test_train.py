"""`dppo train` from end to end, on tiny random models with a reward that they can get."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import composed, read_json, read_lines, train
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dppo_cli.cli import main
from dppo_cli.evaluate import evaluate, read_run_config

WEIGHTS = "adapter/adapter_model.safetensors"

pytestmark = pytest.mark.usefixtures("work")


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]


# What a run leaves


def test_a_run_folder_holds_what_it_promises(model: Path, work: Path) -> None:
    assert train(model, "steps=3", "checkpoint_every=1", "eval.every=2", "run_dir=run") == 0
    run = work / "run"
    assert sorted(p.name for p in run.iterdir()) == [
        "adapter",
        "checkpoints",
        "config.yaml",
        "masked_tokens.json",
        "metrics.jsonl",
        "summary.json",
    ]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-1", "step-2", "step-3"]
    for folder in (run / "adapter", *(run / "checkpoints").iterdir()):
        assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in folder.iterdir()}
        # No pickle anywhere.
        assert not list(folder.glob("*.bin"))

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
        assert time["rollout_tokens_per_second"] > time["tokens_per_second"] > 0


def test_the_last_checkpoint_is_the_adapter(model: Path, work: Path) -> None:
    assert train(model, "steps=4", "checkpoint_every=2", "run_dir=run") == 0
    last, before = (work / f"run/checkpoints/step-{n}/adapter_model.safetensors" for n in (4, 2))
    assert last.read_bytes() == (work / "run" / WEIGHTS).read_bytes()
    assert before.read_bytes() != last.read_bytes()


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


# Seeds


def test_equal_commands_give_equal_runs(model: Path, work: Path) -> None:
    for run in ("one", "two"):
        assert train(model, "steps=3", f"run_dir={run}", "eval.every=1", "checkpoint_every=3") == 0
    one, two = (without_times(read_lines(work / run / "metrics.jsonl")) for run in ("one", "two"))
    # As text, which is to say in every bit.
    assert json.dumps(one) == json.dumps(two)
    assert (work / "one" / WEIGHTS).read_bytes() == (work / "two" / WEIGHTS).read_bytes()
    assert (work / "one/masked_tokens.json").read_text() == (work / "two/masked_tokens.json").read_text()


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


# Choices


@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize("approx", ["binary", "topk", "full"])
def test_every_divergence_runs_with_every_approximation(divergence: str, approx: str, model: Path, work: Path) -> None:
    """The rollouts are the same; what the mask is taken from differs, and binary <= top-K <= full."""
    k = ["approx.k=5"] if approx == "topk" else []
    words = [f"divergence={divergence}", f"approx={approx}", *k, "optim.lr=0.02", "steps=1", "run_dir=run"]
    assert train(model, *words) == 0
    (row,) = read_lines(work / "run/metrics.jsonl")
    assert 0 < row["divergence_p50"] < row["divergence_p100"]
    if divergence == "tv":
        assert row["divergence_p100"] <= 1
        # The total variation of any support that names the sampled token is at least |pi - mu| of that token.
        slack = 1e-6 if approx == "binary" else 1.0
        assert row["shift_max"] - 1e-6 <= row["divergence_p100"] <= row["shift_max"] + slack


def test_approximations_lose_divergence_in_order(model: Path, work: Path) -> None:
    """At the second update of the first step, where all have seen the same tokens and hardly moved."""
    found = {}
    for approx in ("binary", "topk", "full"):
        words = [f"approx={approx}", "divergence.delta_low=1", "divergence.delta_high=1", "optim.lr=0.01"]
        assert train(model, *words, "steps=1", f"run_dir={approx}") == 0
        found[approx] = read_lines(work / approx / "metrics.jsonl")[0]
    # No mask, so all three made the same update.
    assert found["binary"]["shift_max"] == pytest.approx(found["full"]["shift_max"], abs=1e-6)
    for quantile in ("divergence_p90", "divergence_p100"):
        binary, topk, full = (found[approx][quantile] for approx in ("binary", "topk", "full"))
        assert binary < topk <= full + 1e-6


@pytest.mark.parametrize(
    "overrides",
    [
        ["objective=ppo"],
        ["objective=gspo"],
        ["objective=minirl"],
        ["objective=ipo"],
        ["objective=drpo"],
        ["advantage=leave_one_out", "aggregation=seq_mean_token_sum"],
        ["anchor=recompute", "approx=topk"],
        ["anchor=recompute", "approx=full"],
        ["kl_to_reference=0.1"],
        ["hardware.gradient_checkpointing=true"],
        ["rollout.merge=false"],
        ["rollout.dtype=bfloat16"],
        ["rollout.concurrent_sequences=3"],
        ["batch.epochs=2", "optim.schedule=cosine", "optim.warmup_updates=2"],
        ["prompt.template=chat", "prompt.system=Count."],
        ["sampling.temperature=0.7"],
        ["adapter.target_modules=[q_proj]", "adapter.dropout=0.1"],
        ["adapter=qlora"],
    ],
    ids=" ".join,
)
def test_other_choices_run(overrides: list[str], model: Path, work: Path) -> None:
    assert train(model, *overrides, "batch.prompts_per_update=2", "steps=1", "run_dir=run") == 0
    (row,) = read_lines(work / "run/metrics.jsonl")
    assert row["gradient_norm"] > 0
    # Whatever the choice, sampler and trainer agree: to float32 rounding, or to that of the precision sampled in.
    # (Dropout on the adapter, whose output is still zero, adds nothing here.)
    in_bfloat16 = "rollout.dtype=bfloat16" in overrides
    assert row["mismatch_mean"] < (0.02 if in_bfloat16 else 1e-5)
    assert not in_bfloat16 or row["mismatch_mean"] > 1e-5


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2", "gemma2", "cohere2"])
def test_other_architectures_run(architecture: str, tiny_models: dict[str, Path], work: Path) -> None:
    assert train(tiny_models[architecture], "run_dir=run", "optim.lr=0.01", "approx=topk", "approx.k=4") == 0
    for row in read_lines(work / "run/metrics.jsonl"):
        assert row["mismatch_mean"] < 1e-5 and row["gradient_norm"] > 0


def test_several_updates_of_one_rollout_move_away_from_mu(model: Path, work: Path) -> None:
    """mu stays what the sampler reported, so pi - mu grows with every update; with one update there is none."""
    assert train(model, "batch.prompts_per_update=2", "steps=1", "run_dir=once") == 0
    assert train(model, "batch.prompts_per_update=2", "batch.epochs=3", "steps=1", "run_dir=thrice") == 0
    once, thrice = (read_lines(work / run / "metrics.jsonl")[0] for run in ("once", "thrice"))
    assert once["shift_max"] == pytest.approx(0, abs=1e-5)
    assert thrice["shift_max"] > 100 * once["shift_max"] and thrice["shift_mean"] > 1e-4
    assert thrice["mismatch_mean"] == once["mismatch_mean"]


def test_an_update_leaves_no_gradient_to_the_next(model: Path, work: Path) -> None:
    """Rewards differ in the first step and are equal in the second."""
    (work / "once.py").write_text(
        "calls = []\ndef f(prompts, completions, **columns):\n    calls.append(1)\n"
        "    return [float(len(calls) == 2 and i % 2) for i in range(len(completions))]\n"
    )
    assert train(model, "reward.path=once.py:f", "steps=2", "run_dir=run") == 0
    first, second = (row["gradient_norm"] for row in read_lines(work / "run/metrics.jsonl"))
    assert first > 0
    assert second == 0


def test_where_the_trust_region_is_centred(model: Path, work: Path) -> None:
    """At the first update pi is what the trainer says pi_old is, but not what a sampler in bfloat16 said mu was."""
    words = ["rollout.dtype=bfloat16", "batch.prompts_per_update=2", "steps=1"]
    found = {}
    for anchor in ("rollout", "recompute"):
        assert train(model, *words, f"anchor={anchor}", f"run_dir={anchor}") == 0
        found[anchor] = read_lines(work / anchor / "metrics.jsonl")[0]
    assert found["rollout"]["shift_max"] > 1e-4
    assert found["rollout"]["divergence_p100"] == pytest.approx(found["rollout"]["shift_max"], abs=1e-6)
    assert found["recompute"]["divergence_p100"] < 1e-5
    assert found["recompute"]["shift_max"] == found["rollout"]["shift_max"]


def test_evaluations_have_a_temperature_of_their_own(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(engine: Any, prompts: Any, scorer: Any, sampling: Any, samples: int, *rest: Any) -> Any:
        seen.append((sampling.temperature, sampling.max_new_tokens, samples))
        return evaluate(engine, prompts, scorer, sampling, samples, *rest)

    monkeypatch.setattr("dppo_cli.train.evaluate", record)
    words = ["eval.temperature=0", "eval.samples_per_prompt=3", "eval.every=1", "sampling.temperature=0.9"]
    assert train(model, *words, "run_dir=run") == 0
    assert seen == [(0.0, 4, 3)] * 3


def test_a_reward_without_differences_trains_nothing(model: Path, work: Path) -> None:
    (work / "same.py").write_text("def f(prompts, completions, **columns):\n    return [1.0 for _ in completions]\n")
    assert train(model, "reward.path=same.py:f", "steps=1", "run_dir=run") == 0
    (row,) = read_lines(work / "run/metrics.jsonl")
    assert (row["equal_groups"], row["skipped"], row["gradient_norm"], row["reward"]) == (1.0, 1.0, 0.0, 1.0)
    assert row["divergence_p50"] is None and row["entropy"] is None
    tensors = load_file(work / "run" / WEIGHTS)
    assert all(t.abs().max() == 0 for name, t in tensors.items() if "lora_B" in name)


def test_columns_and_answers_reach_the_reward(model: Path, work: Path) -> None:
    rows = [{"question": f"{i}+1=", "solution": f"it is #### {i + 1}", "level": i} for i in range(8)]
    (work / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (work / "seen.py").write_text(
        "import json\n"
        "def f(prompts, completions, answer, level):\n"
        "    with open('seen.jsonl', 'a') as file:\n"
        "        for row in zip(prompts, completions, answer, level):\n"
        "            file.write(json.dumps(row) + '\\n')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    words = ["data=file", "data.path=problems.jsonl", "data.prompt_column=question", "data.answer_column=solution"]
    words += ["data.answer_pattern='#### (.+)'", "reward.path=seen.py:f", "steps=1", "run_dir=run"]
    assert train(model, *words) == 0
    seen = read_lines(work / "seen.jsonl")
    assert {(prompt, answer, level) for prompt, _, answer, level in seen} <= {
        (row["question"], row["solution"].split("#### ")[1], row["level"]) for row in rows
    }
    # 4 held-out problems before and after, and 2 prompts x 4 samples.
    assert len(seen) == 4 + 8 + 4
    assert {level for _, _, _, level in seen[:4]} == {4, 5, 6, 7}
    assert {level for _, _, _, level in seen[4:12]} < {0, 1, 2, 3}


# Learning


def test_training_raises_the_reward(model: Path, work: Path) -> None:
    """From a random model's 7% of even digits to nearly all, within 15 steps."""
    words = ["steps=15", "optim.lr=0.02", "batch.prompts_per_step=8", "batch.samples_per_prompt=8"]
    words += ["batch.prompts_per_update=4", "sampling.max_new_tokens=8", "eval.success_reward=0.8", "run_dir=run"]
    words += ["reward.path=rewards.py:even"]
    assert train(model, *words) == 0
    rewards = [row["reward"] for row in read_lines(work / "run/metrics.jsonl")]
    assert rewards[0] < 0.2
    assert sum(rewards[-3:]) / 3 > 0.8
    summary = read_json(work / "run/summary.json")
    assert summary["eval_before"] < 0.2 and summary["eval_after"] > 0.7
    # And it is the saved adapter that has learnt it: plain transformers and PEFT, greedy.
    base = AutoModelForCausalLM.from_pretrained(model)
    prompt = torch.tensor([[3, 4, 13, 5, 6, 15]])
    policy = PeftModel.from_pretrained(base, str(work / "run/adapter"))
    answer = policy.generate(input_ids=prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, 6:]
    even = {3, 5, 7, 9, 11}  # The ids of 0, 2, 4, 6, 8.
    assert sum(int(token) in even for token in answer) >= 4


# Sweeps


def test_a_sweep_prints_a_table_and_makes_a_run_folder_per_job(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, "-m", "divergence=tv,kl", "steps=1") == 0
    (sweep,) = (work / "sweeps").iterdir()
    assert sorted(p.name for p in sweep.iterdir()) == ["0", "1", "multirun.yaml"]
    targets = [OmegaConf.load(sweep / job / "config.yaml").divergence._target_ for job in ("0", "1")]
    assert [t.rpartition(".")[2] for t in targets] == ["TotalVariation", "KL"]
    for job in ("0", "1"):
        assert read_json(sweep / job / "summary.json")["steps"] == 1
        assert (sweep / job / WEIGHTS).is_file()
    assert (work / "runs/last").resolve() == sweep / "1"
    table = capsys.readouterr().out.split(" sweep ")[1]
    assert "divergence=tv" in table.replace("\n", "") and "divergence=kl" in table.replace("\n", "")
    assert table.count("0.0%") == 4


def test_a_job_that_fails_does_not_end_a_sweep(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, "-m", "optim.lr=-1,0.001", "steps=1", "run_dir=sweep") == 2
    assert not (work / "sweep/0").exists()
    assert read_json(work / "sweep/1/summary.json")["steps"] == 1
    captured = capsys.readouterr()
    assert captured.err == "dppo: optim.lr=-1.0 breaks the rule lr > 0\n"
    assert "failed" in captured.out


def test_a_sweep_in_which_every_job_fails_leaves_nothing(model: Path, work: Path) -> None:
    assert train(model, "-m", "optim.lr=-1,-2", "run_dir=sweep") == 2
    assert not (work / "sweep").exists()
    assert train(model, "-m", "approx=binary,trinary", "run_dir=sweep") == 2
    assert not (work / "sweep").exists()


def test_the_config_file_of_a_run_rebuilds_the_same_config(model: Path, work: Path) -> None:
    assert train(model, "steps=1", "run_dir=run", "approx=topk", "approx.k=3") == 0
    config = read_run_config(work / "run")
    assert config.approx.num_logprobs == 3 and config.steps == 1 and config.run_dir == "run"
    assert composed("train").optim.keys() == OmegaConf.load(work / "run/config.yaml").optim.keys()
