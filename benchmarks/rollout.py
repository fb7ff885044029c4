"""Tokens per second of the in-process engine against transformers' `generate` with the same sampling.

    python benchmarks/rollout.py [max_new_tokens]

SmolLM2-135M in float32 with a LoRA r=16 adapter, 8 prompts x 8 samples, temperature 1. The two sides alternate in one
process, on the same prompts. `generate` runs a plain model with the adapter merged into it and reports no log-probs;
ours does.
"""

import copy
import statistics
import sys
import time
from collections.abc import Sequence

import torch
from measure import Spread, save, smollm2, sums
from transformers import PreTrainedModel

from dppo_cli.config.sections import Hardware, LoRA, Model, Prompting, Sampling
from dppo_cli.data.file import File
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import RolloutEngine, in_order
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.types import Prompt


def main(max_new_tokens: int, rounds: int = 4) -> None:
    hardware = Hardware("cpu", "float32", 2048, 256, False, 1)
    adapter = LoRA(
        r=16,
        alpha=32,
        dropout=0.0,
        target_modules="all-linear",
        quantization=None,
        use_dora=False,
        use_rslora=False,
        path=None,
    )
    policy = load_policy(Model(str(smollm2()), None, None), hardware, warn=print, adapter=adapter)
    data = File(str(sums()), None, None, None, "prompt", None, "answer", None, None, None, 8, "refuse")
    prompts = policy.encode(data.load(print).train[:8], Prompting("chat", None, {}, "refuse"))
    sampling = Sampling(1.0, 1.0, 0, 0.0, max_new_tokens, [])
    engine = LocalRollout(weights="merged", dtype=None, concurrent_sequences=512, max_logprobs=1024).load(policy, print)
    with engine:
        engine.sync(version=0)
        compare(engine, policy, prompts, sampling, rounds)


def compare(engine: RolloutEngine, policy: Policy, prompts: Sequence[Prompt], sampling: Sampling, rounds: int) -> None:
    """Run both sides, save and print. The first round is a warm-up and is left out."""
    plain = merged_by_peft(policy)
    width = max(len(p.token_ids) for p in prompts)
    ids = [[policy.pad_id] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts for _ in range(8)]
    mask = [[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts for _ in range(8)]
    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    lengths: dict[str, list[float]] = {"ours": [], "generate": []}
    for turn in range(1 + rounds):
        start = time.perf_counter()
        completions = in_order(engine.generate(prompts, 8, sampling, 0, seed=turn))
        mine = time.perf_counter() - start
        own = [len(c.token_ids_T) for row in completions for c in row]
        torch.manual_seed(turn)
        start = time.perf_counter()
        with torch.no_grad():
            out = plain.generate(
                input_ids=torch.tensor(ids),
                attention_mask=torch.tensor(mask),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=list(policy.eos_ids),
                pad_token_id=policy.pad_id,
            )
        theirs = time.perf_counter() - start
        other = [_length(row, policy.eos_ids) for row in out[:, width:].tolist()]
        if turn:
            for side, seconds, tokens in (("ours", mine, own), ("generate", theirs, other)):
                rates[side].append(sum(tokens) / seconds)
                lengths[side].append(statistics.mean(tokens))
    found = {
        "tokens_per_second": {side: Spread.of(values) for side, values in rates.items()},
        "ratio": Spread.of([a / b for a, b in zip(rates["ours"], rates["generate"], strict=True)]),
        "response_tokens": {side: statistics.mean(values) for side, values in lengths.items()},
    }
    print(sampling.max_new_tokens, found)
    save(f"rollout_{sampling.max_new_tokens}", found)


def merged_by_peft(policy: Policy) -> PreTrainedModel:
    """A plain transformers model with the adapter merged in by PEFT."""
    assert policy.peft is not None
    return copy.deepcopy(policy.peft).merge_and_unload()  # type: ignore[no-any-return]


def _length(tokens: list[int], eos_ids: tuple[int, ...]) -> int:
    """Number of tokens up to the first end-of-sequence token, which counts."""
    return next((i + 1 for i, token in enumerate(tokens) if token in eos_ids), len(tokens))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
