"""A whole training step against the peer.

    python benchmarks/step.py 64                  # against TRL's DPPOTrainer at 64 new tokens, in float32; also 256
    python benchmarks/step.py 64 topk             # the same with top-K on both sides
    python benchmarks/step.py 64 binary bfloat16  # in bfloat16, the fastest for both sides where the processor has it
    python benchmarks/step.py 64 binary float32 all_differ  # a reward that differs between samples: none is skipped

SmolLM2-135M, LoRA r=16 alpha=32 on all linear layers, 8 prompts x 8 samples, one update per step, AdamW 1e-5,
temperature 1. The first step of every process is a warm-up and is left out. Memory is the peak resident size of the
whole process.
"""

import shutil
import statistics
import sys
from typing import Any

import torch
from measure import BUILD, HERE, Finished, Spread, peer_python, run_json, save, smollm2, sums, train

from dppo_cli.kernels.products import has_onednn

WARM_UP = 1


def work(max_new_tokens: int, *more: str) -> list[str]:
    """The overrides of the benchmark's run."""
    return [
        f"model.path={smollm2()}",
        "prompt.template=chat",
        "data=file",
        f"data.path={sums()}",
        "data.eval_problems=8",
        "reward=function",
        f"reward.path={HERE / 'reward.py'}:contains_answer",
        "adapter.r=16",
        "adapter.alpha=32",
        "batch.prompts_per_step=8",
        "batch.samples_per_prompt=8",
        "batch.prompts_per_update=8",
        "optim.lr=1e-5",
        # Smaller micro-batches than the default take a little more time and far less memory.
        "hardware.tokens_per_micro_batch=256",
        "hardware.head_chunk=128",
        f"sampling.max_new_tokens={max_new_tokens}",
        *more,
    ]


def ours(max_new_tokens: int, steps: int, *more: str) -> tuple[list[dict[str, Any]], Finished]:
    """Metrics of our steps without the warm-up, and the process."""
    folder = BUILD / "run"
    shutil.rmtree(folder, ignore_errors=True)
    metrics, process = train(folder, *work(max_new_tokens, f"steps={WARM_UP + steps}", *more))
    return metrics[WARM_UP:], process


def seconds(steps: list[dict[str, Any]]) -> list[float]:
    return [step["time"]["total"] for step in steps]


def against_peer(
    max_new_tokens: int,
    approx: str = "binary",
    dtype: str = "float32",
    reward: str = "contains_answer",
    steps: int = 3,
) -> None:
    """One process of ours, then one of the peer's.

    Ours runs twice the steps, because they vary more: samples without advantage are skipped, and their share varies.
    """
    name = f"peer_{max_new_tokens}_{approx}_{dtype}" + ("" if reward == "contains_answer" else f"_{reward}")
    if dtype == "bfloat16" and not has_onednn(torch.device("cpu"), torch.bfloat16):
        # torch's own product takes over 300 times as long as in float32 there, so the run would seem to hang.
        save(name, {"not_run": "oneDNN has no bfloat16 on this processor"})
        print(f"{name}: not run, oneDNN has no bfloat16 on this processor", flush=True)
        return
    rewarded = f"reward.path={HERE / 'reward.py'}:{reward}"
    mine, process = ours(max_new_tokens, 2 * steps, f"approx={approx}", f"hardware.dtype={dtype}", rewarded)
    peer, peer_process = run_json(
        "peer_step.py",
        *("--model", smollm2(), "--data", sums(), "--out", BUILD / "peer_run", "--divergence", f"{approx}_tv"),
        *("--steps", str(WARM_UP + steps), "--max-new-tokens", str(max_new_tokens), "--reward", reward),
        *(["--bf16"] if dtype == "bfloat16" else []),
        python=peer_python(),
    )
    own, other = Spread.of(seconds(mine)), Spread.of(peer["seconds"][WARM_UP:])
    found = {
        "ours_seconds": own,
        "peer_seconds": other,
        "speedup": Spread(other.low / own.high, other.median / own.median, other.high / own.low),
        "ours_gib": process.peak_gib,
        "peer_gib": peer_process.peak_gib,
        "memory_ratio": process.peak_gib / peer_process.peak_gib,
        "ours_response_tokens": statistics.mean(step["response_tokens"] for step in mine),
        "peer_response_tokens": statistics.mean(peer["response_tokens"][WARM_UP:]),
        "ours_skipped": statistics.mean(step["skipped"] for step in mine),
        "ours_phases": {name: statistics.median(s["time"][name] for s in mine) for name in ("rollout", "update")},
        "ours_steps": mine,
    }
    print(max_new_tokens, approx, dtype, {k: v for k, v in found.items() if k != "ours_steps"}, flush=True)
    save(name, found)


if __name__ == "__main__":
    against_peer(int(sys.argv[1]), *sys.argv[2:])
