"""How a step's time and peak memory grow with response length, samples per prompt and vocabulary.

    python benchmarks/growth.py

The model is a Llama with random weights (hidden 384, 6 layers, float32). It practically never samples the
end-of-sequence token, so that responses have the length asked for. LoRA r=16, 4 prompts, one update per step. Each
point runs in a process of its own.
"""

import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from measure import BUILD, HERE, Spread, save, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LENGTHS = (64, 128, 256, 512, 1024)
SAMPLES = (4, 8, 16, 32)
VOCABULARIES = (32_000, 64_000, 128_000, 256_000)
AXES = {
    "response tokens": ([(n, 8, 32_000) for n in LENGTHS], LENGTHS),
    "samples per prompt": ([(128, n, 32_000) for n in SAMPLES], SAMPLES),
    "vocabulary": ([(64, 8, n) for n in VOCABULARIES], VOCABULARIES),
}


def random_model(vocabulary: int) -> Path:
    """A folder with a random model and the embedded model's tokenizer, made on first use."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    import dppo_cli.embedded

    folder = BUILD / f"random_{vocabulary}"
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(Path(dppo_cli.embedded.__file__).parent / "arithmetic_1m")
        config = LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def point(length: int, samples: int, vocabulary: int, steps: int = 3) -> dict[str, Any]:
    """One setting: seconds of the steps after the first, peak memory of the process."""
    folder = BUILD / "run"
    shutil.rmtree(folder, ignore_errors=True)
    metrics, process = train(
        folder,
        f"model.path={random_model(vocabulary)}",
        "adapter.r=16",
        "data.eval_problems=1",
        "reward=function",
        f"reward.path={HERE / 'reward.py'}:every_other",
        "batch.prompts_per_step=4",
        f"batch.samples_per_prompt={samples}",
        "batch.prompts_per_update=4",
        f"sampling.max_new_tokens={length}",
        "optim.lr=1e-6",
        f"steps={1 + steps}",
    )
    # A sequence may end early now and then.
    assert all(step["response_tokens"] > 0.85 * length for step in metrics)
    return {
        "response tokens": length,
        "samples per prompt": samples,
        "vocabulary": vocabulary,
        "seconds": Spread.of([step["time"]["total"] for step in metrics[1:]]),
        "rollout": Spread.of([step["time"]["rollout"] for step in metrics[1:]]),
        "update": Spread.of([step["time"]["update"] for step in metrics[1:]]),
        "ms_per_token": statistics.median(
            1000 * step["time"]["total"] / (4 * samples * step["response_tokens"]) for step in metrics[1:]
        ),
        "gib": process.peak_gib,
    }


def exponent(x: list[float], y: list[float]) -> float:
    """The slope of log y against log x over the last doubling: 1 is linear."""
    return float(np.log(y[-1] / y[-2]) / np.log(x[-1] / x[-2]))


def main() -> None:
    found: dict[str, Any] = {}
    figure, panels = plt.subplots(2, len(AXES), figsize=(4 * len(AXES), 6))
    for column, (axis, (points, values)) in enumerate(AXES.items()):
        rows = [point(*p) for p in points]
        x = [float(v) for v in values]
        medians = [row["seconds"].median for row in rows]
        memory = [row["gib"] for row in rows]
        found[axis] = {"points": rows, "time_exponent": exponent(x, medians), "memory_exponent": exponent(x, memory)}
        for row, (y, label) in enumerate([(medians, "seconds per step"), (memory, "peak memory, GiB")]):
            slope, offset = np.polyfit(x, y, 1)
            panel = panels[row, column]
            panel.plot(x, y, "o", color="C0")
            panel.plot(x, [offset + slope * v for v in x], color="0.6", linewidth=1)
            panel.set_ylim(0, 1.1 * max(y))
            panel.set_xlabel(axis)
            panel.set_ylabel(label)
            found[axis][f"r2_{'time' if row == 0 else 'memory'}"] = float(np.corrcoef(x, y)[0, 1] ** 2)
        print(axis, found[axis], flush=True)
    figure.tight_layout()
    figure.savefig(HERE / "growth.png", dpi=120)
    save("growth", found)


if __name__ == "__main__":
    sys.exit(main())
