"""Steps of gpu.py about other families than Llama: sampling with static steps and without, and updates."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gpu_decode import seconds_of, static_engine
from gpu_model import LLAMA_8B, TINY, Size
from gpu_steps import BF16, Bench, prompts_of, update
from transformers import Gemma3TextConfig, Phi3Config

from dppo_cli.kernels.graphs import Graphs
from dppo_cli.policy.forward import SharedPrompts

PLAIN_TOKENS = 16
"""Sampled without static steps, which takes several times as long."""


def _types(layers: int, every: int) -> list[str]:
    """All but each `every`-th layer have a window."""
    return ["sliding_attention" if (i + 1) % every else "full_attention" for i in range(layers)]


def gemma(size: Size, window: int, layers: int, **shapes: int) -> Size:
    kinds = {"layer_types": _types(layers, min(6, layers)), "sliding_window": window, "tie_word_embeddings": True}
    of = {**size.model, "num_hidden_layers": layers, **shapes}
    return replace(size, model={**of, **kinds, "query_pre_attn_scalar": of["head_dim"]}, config=Gemma3TextConfig)


def phi(size: Size, rotated: int, **shapes: int) -> Size:
    of = {**size.model, **shapes}
    short = {"short_factor": [1.0] * (rotated // 2), "long_factor": [2.0] * (rotated // 2)}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": rotated / of["head_dim"], **short}
    more = {"rope_parameters": rope, "original_max_position_embeddings": 4096, "tie_word_embeddings": True}
    return replace(size, model={**of, **more, "pad_token_id": 0}, config=Phi3Config)


SIZES: dict[str, tuple[Size, Size]] = {
    # Its window of 512 is passed by 256 + 512 tokens.
    "Gemma 3 1B": (
        gemma(
            LLAMA_8B,
            window=512,
            layers=26,
            **dict(hidden_size=1152, intermediate_size=6912, num_attention_heads=4, num_key_value_heads=1),
            **dict(head_dim=256, vocab_size=262144),
        ),
        gemma(TINY, window=12, layers=2),
    ),
    "Phi-4-mini": (
        phi(
            LLAMA_8B,
            rotated=96,
            **dict(hidden_size=3072, intermediate_size=8192, num_attention_heads=24, vocab_size=200064),
        ),
        phi(TINY, rotated=12),
    ),
}
"""By name, in full and tiny."""


def family(bench: Bench, name: str) -> None:
    """Milliseconds of a step of so many rows in both ways, and seconds of an update in both."""
    full, tiny = SIZES[name]
    bench.forget()
    other = replace(bench, size=tiny if bench.size is TINY else full, policies={})
    size = other.size
    rows = size.rows[1]
    prompts = prompts_of(size, rows // size.group, size.prompt + (size.new - size.decoded) // 2)

    def sample(engine: Any, tokens: int) -> float:
        _, prefill, _ = seconds_of(other, engine, prompts, size.group, 1, 0)
        _, seconds, _ = seconds_of(other, engine, prompts, size.group, tokens, 0)
        return 1e3 * (seconds - prefill) / (tokens - 1)

    with static_engine(other, BF16, rows, Graphs) as engine:
        static = sample(engine, size.decoded)
        engine.refilling = None
        plain = sample(engine, min(PLAIN_TOKENS, size.decoded))
    how = f"{name}, bf16 + LoRA"
    bench.add(f"{how}, {rows} rows", ms_per_step=static, tokens_per_s=1e3 * rows / static, plain_ms_per_step=plain)
    update(other, BF16, f"{how}, update")
    update(other, BF16, f"{how}, update, prompts first", SharedPrompts)
    other.forget()


def _of(name: str) -> Callable[[Bench], None]:
    return lambda bench: family(bench, name)


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "gemma3": (60, _of("Gemma 3 1B")),
    "phi4": (80, _of("Phi-4-mini")),
}
"""As in gpu_steps.py."""
