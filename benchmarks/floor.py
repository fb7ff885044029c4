"""How close each phase of the benchmark's step comes to the machine's limits.

    python benchmarks/floor.py      # reads the steps that `step.py 64` and `step.py 256` have saved, or runs them

Two peaks are measured here: operations per second of a large float32 matrix product, and bytes per second of a large
copy. The floor of a phase is the time it would take at the peaks: its operations or its bytes, whichever takes longer.
Both are counted from the model's shape and the tokens that the run reports. Elementwise work, attention and Python
count as zero, so no phase can reach its floor.
"""

import json
import statistics
import time
from typing import Any

import torch
from measure import BUILD, Spread, save, smollm2, sums
from step import ours
from transformers import AutoConfig, AutoTokenizer

from dppo_cli.policy.forward import common_tokens

PROMPTS = GROUP = 8


def peaks() -> tuple[float, float]:
    """Best of ten: float32 operations per second of a matrix product, bytes per second read and written by a copy."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    source, target = torch.randn(64 * 2**20), torch.empty(64 * 2**20)
    flops = max(2 * 2048**3 / _seconds(lambda: torch.mm(a, b)) for _ in range(10))
    moved = max(2 * source.nbytes / _seconds(lambda: target.copy_(source)) for _ in range(10))
    return flops, moved


def floors(
    config: Any, steps: list[dict[str, Any]], beginning: int, peak_flops: float, peak_bytes: float
) -> dict[str, Any]:
    """Seconds and floor of sampling and of the update. The `beginning` tokens that all prompts share run once."""
    hidden, inner, layers, vocabulary = (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.vocab_size,
    )
    kv = config.num_key_value_heads * config.head_dim
    body = layers * (2 * hidden * config.num_attention_heads * config.head_dim + 2 * hidden * kv + 3 * hidden * inner)
    head = hidden * vocabulary
    sequences = PROMPTS * GROUP
    found: dict[str, Any] = {}
    rows: dict[str, list[tuple[float, float, float]]] = {"rollout": [], "update": []}
    for step in steps:
        tokens = sequences * step["response_tokens"]
        prompt = step["prompt_tokens"]
        rollout_flops = 2 * body * (tokens + beginning + PROMPTS * (prompt - beginning)) + 2 * head * tokens
        # Each token step reads the weights once, and every key and value written so far.
        cache = tokens * (prompt + step["response_tokens"] / 2) * 2 * kv * layers
        rollout_bytes = 4 * (step["response_tokens_max"] * (body + head) + cache)
        trained = 1 - step["skipped"]
        # The forward pass and the gradient of the activations. The frozen weights have no gradient.
        trained_prompts = trained * PROMPTS * (prompt - beginning) + (beginning if trained else 0)
        update_flops = 4 * body * (trained * tokens + trained_prompts) + 4 * head * trained * tokens
        rows["rollout"].append((step["time"]["rollout"], rollout_flops, rollout_bytes))
        rows["update"].append((step["time"]["update"], update_flops, 4.0 * (body + head)))
    for phase, values in rows.items():
        bounds = [max(flops / peak_flops, moved / peak_bytes) for _, flops, moved in values]
        found[phase] = {
            "seconds": Spread.of([seconds for seconds, _, _ in values]),
            "operations_seconds": statistics.median(flops / peak_flops for _, flops, _ in values),
            "bytes_seconds": statistics.median(moved / peak_bytes for _, _, moved in values),
            "times_floor": Spread.of([v[0] / bound for v, bound in zip(values, bounds, strict=True)]),
        }
    return found


def steps(max_new_tokens: int) -> list[dict[str, Any]]:
    """Metrics of our steps, without the warm-up."""
    measured = BUILD / "results" / f"peer_{max_new_tokens}_binary_float32.json"
    if measured.exists():
        return json.loads(measured.read_text())["ours_steps"]  # type: ignore[no-any-return]
    return ours(max_new_tokens, 3)[0]


def beginning() -> int:
    """Number of tokens that all of the benchmark's prompts begin with."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    problems = [json.loads(line)["prompt"] for line in sums().read_text().splitlines()]
    turns = [[{"role": "user", "content": problem}] for problem in problems]
    texts = [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]
    prompts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return common_tokens(prompts)


def main() -> None:
    peak_flops, peak_bytes = peaks()
    config = AutoConfig.from_pretrained(smollm2())
    found: dict[str, Any] = {"gflops": peak_flops / 1e9, "gb_per_second": peak_bytes / 1e9}
    for max_new_tokens in (64, 256):
        found[str(max_new_tokens)] = floors(config, steps(max_new_tokens), beginning(), peak_flops, peak_bytes)
    print(found)
    save("floor", found)


def _seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
