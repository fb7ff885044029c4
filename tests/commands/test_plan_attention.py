"""Attention over segments, of which a plan runs one of those that are alike: the numbers of running all."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_models
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dppo_cli.algorithm.approx import Binary
from dppo_cli.commands.planning import update
from dppo_cli.commands.planning.attention import counted_attention
from dppo_cli.commands.planning.prompts import assumed_prompts
from dppo_cli.commands.planning.recorder import Recorder
from dppo_cli.commands.planning.shapes import make_shapes, read_source
from dppo_cli.commands.planning.update import UpdateCost, update_cost
from dppo_cli.config.sections import Hardware, LoRA, Model
from dppo_cli.kernels.segment_kernels import FlashOnCPU
from dppo_cli.kernels.segments import Segments, attend
from dppo_cli.policy.packed_forward import PackedGroups

ADAPTER = LoRA(4, 8.0, 0.0, "all-linear", None, False, False, None)
HARDWARE = Hardware("cpu", "float32", 160, 16, False, 1)
PROMPTS = [prompt for length in (8, 5, 8) for prompt in assumed_prompts(1, length)]


def of_llama(folder: Path) -> Path:
    return tiny.save(folder)


def of_gemma(folder: Path) -> Path:
    """With windows that prompts and responses pass."""
    return tiny_models.save(folder, "gemma3")


@pytest.mark.parametrize(
    ("family", "quantization", "checkpointing", "dtype"),
    [
        *itertools.product([of_llama], [None, "nf4"], [False, True], [torch.float32, torch.bfloat16]),
        (of_gemma, None, False, torch.float32),
        (of_gemma, "nf4", True, torch.bfloat16),
    ],
)
def test_an_update_costs_what_it_costs_pair_by_pair(
    family: Callable[[Path], Path],
    quantization: str | None,
    checkpointing: bool,
    dtype: torch.dtype,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Exactly, in every number."""
    monkeypatch.setattr(update, "choose_for", lambda *_: PackedGroups)
    source = read_source(Model(str(family(tmp_path / "m")), None, None))

    def cost(on_cpu: bool) -> UpdateCost:
        hardware = replace(HARDWARE, gradient_checkpointing=checkpointing)
        shapes = make_shapes(source, replace(ADAPTER, quantization=quantization), hardware, dtype, on_cpu)
        return update_cost(shapes, PROMPTS, 4, 16, hardware, Binary(), reference=False)

    counted, on_gpu = cost(on_cpu=True), cost(on_cpu=False)
    monkeypatch.setattr(update, "counted_attention", lambda *_: nullcontext())
    run, run_for_gpu = cost(on_cpu=True), cost(on_cpu=False)
    assert counted == run and run.work.operations > 1000
    # There one call computes all pairs, and makes the results alone.
    assert replace(on_gpu, work=run_for_gpu.work) == run_for_gpu
    assert on_gpu.work.flops == run_for_gpu.work.flops
    assert on_gpu.work.made < run_for_gpu.work.made
    assert on_gpu.work.operations < 0.7 * run_for_gpu.work.operations


def test_within_it_alone_and_only_over_segments() -> None:
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module = torch.nn.Linear(1, 1)
    module.is_causal = True  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 5, 8, generator=generator)
    segments = Segments((3,), ((2,),))
    with counted_attention(Recorder(), on_cpu=True):
        counted = ALL_ATTENTION_FUNCTIONS["sdpa"]
        plain, _ = counted(module, q, k, v, None, scaling=0.5)
        over_segments, _ = counted(module, q, k, v, None, segments=segments, scaling=0.5)
    assert counted is not usual and ALL_ATTENTION_FUNCTIONS["sdpa"] is usual
    assert torch.equal(plain, usual(module, q, k, v, None, scaling=0.5)[0])
    expected = attend(*(x[0].transpose(0, 1) for x in (q, k, v)), segments, 0.5, FlashOnCPU)
    assert over_segments.shape == expected[None].shape and over_segments.dtype == expected.dtype
