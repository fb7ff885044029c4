"""Sampling in this process against transformers' generate with the same sampling, tokens a second.

    python benchmarks/rollout.py [max_new_tokens]

SmolLM2-135M in float32 with a LoRA r=16 adapter, 8 prompts x 8 samples, temperature 1. Both sides in one process, in
turn, on the same prompts; `generate` runs a plain model with the adapter merged into it, and reports no log-probs; ours
does.
"""

import copy
import statistics
import sys
import time

import torch
from measure import Spread, save, smollm2, sums
from transformers import PreTrainedModel

from dppo_cli.data.file import JsonLines
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.sections import Hardware, LoRA, Prompting, Sampling


def main(max_new_tokens: int, rounds: int = 4) -> None:
    hardware = Hardware("cpu", "float32", 2048, 256, False)
    adapter = LoRA(r=16, alpha=32, dropout=0.0, target_modules="all-linear", quantization=None)
    policy = load_policy(str(smollm2()), None, hardware, new_adapter=adapter)
    data = JsonLines(str(sums()), None, 8, "prompt", "answer", None)
    prompts = policy.encode(data.load().train[:8], Prompting("chat", None))
    sampling = Sampling(1.0, 1.0, 0, 0.0, max_new_tokens)
    engine = LocalRollout(merge=True, dtype=None, concurrent_sequences=512, max_logprobs=1024).load(policy)
    plain = merged_by_peft(policy)
    width = max(len(p.token_ids) for p in prompts)
    ids = [[policy.pad_id] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts for _ in range(8)]
    mask = [[0] * (width - len(p.token_ids)) + [1] * len(p.token_ids) for p in prompts for _ in range(8)]
    rates: dict[str, list[float]] = {"ours": [], "generate": []}
    lengths: dict[str, list[float]] = {"ours": [], "generate": []}
    for turn in range(rounds + 1):
        start = time.perf_counter()
        completions = engine.generate(prompts, 8, sampling, 0, seed=turn)
        mine = time.perf_counter() - start
        own = [len(c.token_ids_T) for c in completions]
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
                max_new_tokens=max_new_tokens,
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
    print(max_new_tokens, found)
    save(f"rollout_{max_new_tokens}", found)


def merged_by_peft(policy: Policy) -> PreTrainedModel:
    """A plain transformers model, as PEFT's own merge leaves it."""
    assert policy.peft is not None
    return copy.deepcopy(policy.peft).merge_and_unload()  # type: ignore[no-any-return,operator]


def _length(tokens: list[int], eos_ids: tuple[int, ...]) -> int:
    """Tokens up to and with the first that ends the response."""
    return next((i + 1 for i, token in enumerate(tokens) if token in eos_ids), len(tokens))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
