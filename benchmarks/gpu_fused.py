"""Steps of gpu.py about norms, gates and rotations: the bandwidth of their kernels, and an update without them."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from gpu_steps import BF16, Bench, update
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

REPEATS = 20


def has_triton(device: torch.device) -> bool:
    """On a CPU if its interpreter is asked for."""
    asked = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return asked and importlib.util.find_spec("triton") is not None


def kernels(bench: Bench) -> None:
    """Microseconds, forward and backward, of the kernels and of plain operations; bytes a second against a copy's.

    The bytes are those that a pass has to read and write once.
    """
    if not has_triton(bench.device):
        bench.add("kernels of norms, gates and rotations", not_run="Triton is not installed, or has no GPU")
        return
    from dppo_cli.kernels.fused.gated import swiglu
    from dppo_cli.kernels.fused.norm import add_and_norm, rms_norm
    from dppo_cli.kernels.fused.rotary import rotate

    size = bench.size
    of = size.model
    tokens = size.prompts * size.group * size.new // 4
    hidden, inner, head = of["hidden_size"], of["intermediate_size"], of["head_dim"]
    queries, keys = of["num_attention_heads"], of["num_key_value_heads"]

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)

    def heads(count: int) -> Tensor:
        return random(1, tokens, count, head).transpose(1, 2)

    wide, short = (LlamaRMSNorm(n).to(bench.device, torch.bfloat16).requires_grad_(False) for n in (hidden, head))
    angle = torch.rand(1, tokens, head // 2, device=bench.device).repeat(1, 1, 2)
    angles = angle.cos().bfloat16(), angle.sin().bfloat16()
    # Name, kernel, plain operations, inputs, and how often the backward pass reads or writes as much as one input.
    cases: list[tuple[str, Callable[..., Any], Callable[..., Any], tuple[Tensor, ...], float]] = [
        (f"norm of {hidden}", lambda x: rms_norm(x, wide.weight, 1e-6), wide, (random(tokens, hidden),), 3),
        (f"norm of {head}", lambda x: rms_norm(x, short.weight, 1e-6), short, (random(tokens, queries, head),), 3),
        (
            "rotation",
            lambda q, k: rotate(q, k, *angles),
            lambda q, k: apply_rotary_pos_emb(q, k, *angles),
            (heads(queries), heads(keys)),
            2,
        ),
        (
            "gate",
            swiglu,
            lambda g, u: torch.nn.functional.silu(g) * u,
            (random(tokens, inner), random(tokens, inner)),
            2.5,
        ),
    ]
    for name, kernel, plain, given, times in cases:
        inputs = [x.requires_grad_() for x in given]
        one = sum(x.nbytes for x in inputs)
        out_bytes = one // 2 if name == "gate" else one
        found: dict[str, float | str] = {}
        for way, run in (("", kernel), ("plain_", plain)):
            out = run(*inputs)
            outs = list(out) if isinstance(out, tuple) else [out]
            back = partial(torch.autograd.grad, outs, inputs, [torch.ones_like(x) for x in outs], retain_graph=True)
            forward_s, backward_s = (_seconds(bench, work) for work in (partial(run, *inputs), back))
            found |= {f"{way}us": 1e6 * forward_s, f"{way}backward_us": 1e6 * backward_s}
            if not way:
                bandwidth = bench.copy_bandwidth()
                found["share_of_copy"] = (one + out_bytes) / forward_s / bandwidth
                found["backward_share"] = times * one / backward_s / bandwidth
        bench.add(f"kernel, {name}, {tokens} tokens", **found)
    rows = size.rows[1]
    x, delta = random(rows, 1, hidden), random(rows, 1, hidden)
    with torch.no_grad():
        alone = _seconds(bench, lambda: add_and_norm(x, delta, wide.weight, 1e-6))
        apart = _seconds(bench, lambda: wide(x + delta))
    bench.add(f"kernel, sum and norm of {hidden}, {rows} rows", us=1e6 * alone, plain_us=1e6 * apart)


def _seconds(bench: Bench, work: Callable[[], object]) -> float:
    """Of one among many, after a first that compiles."""
    work()
    repeats = REPEATS if bench.device.type == "cuda" else 1

    def many() -> None:
        for _ in range(repeats):
            work()

    return bench.timed(many)[0] / repeats


@contextmanager
def plain_modules(model: torch.nn.Module) -> Iterator[int]:
    """transformers' own norms, gates and attentions for a while; how many modules were others before."""
    changed: list[tuple[torch.nn.Module, type]] = []
    if importlib.util.find_spec("triton") is not None:
        from dppo_cli.kernels.fused.layers import KINDS

        plain_of = {fused: plain for plain, fused in KINDS.items()}
        changed = [(module, type(module)) for module in model.modules() if type(module) in plain_of]
        for module, kind in changed:
            module.__class__ = plain_of[kind]  # type: ignore[assignment]
    try:
        yield len(changed)
    finally:
        for module, kind in changed:
            module.__class__ = kind  # type: ignore[assignment]


def plain_update(bench: Bench) -> None:
    with plain_modules(bench.policy(BF16).model):
        update(bench, BF16, "update, bf16 LoRA, plain modules")


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "kernels": (30, kernels),
    "update_plain": (60, plain_update),
}
"""As in gpu_steps.py."""
