"""`dppo train` with every kind of choice, on tiny random models, and that it learns."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import read_json, read_lines, train
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dppo_cli.training.evaluation import evaluate

WEIGHTS = "adapter/adapter_model.safetensors"

pytestmark = pytest.mark.usefixtures("work")


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
        ["rollout.weights=adapter"],
        ["rollout.weights=merged", "rollout.dtype=bfloat16"],
        ["adapter=qlora", "rollout.weights=merged"],
        ["adapter=qlora", "rollout.weights=dequantized"],
        ["adapter=qlora", "rollout.weights=quantized"],
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

    monkeypatch.setattr("dppo_cli.training.evaluation.evaluate", record)
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
