"""What sampling costs: keys and values, prompts before it, and products with weights in 4 bits."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import tiny_models
import torch
from transformers import LlamaConfig

from dppo_cli.commands.planning.cards import CARDS
from dppo_cli.commands.planning.prompts import assumed_prompts
from dppo_cli.commands.planning.sampling import Products, SamplingCost, sampling_cost
from dppo_cli.commands.planning.shapes import FourBit, Shapes, make_shapes, read_source
from dppo_cli.config.sections import Hardware, LoRA, Model, Sampling
from dppo_cli.kernels.four_bits import MOST_ROWS
from dppo_cli.kernels.slots import Room
from dppo_cli.rollout.refill import ON_CUDA, room_for
from dppo_cli.rollout.sampling import Wanted

ADAPTER = LoRA(4, 8.0, 0.0, "all-linear", None, False, False, None)
HARDWARE = Hardware("cpu", "float32", 64, 16, False, 1)
SAMPLING = Sampling(1.0, 1.0, 0, 0.0, 8, [])
OWN = Products(copied=False, decoded_for=0)
POSITION = 2 * 2 * 8 * 2 * 4
"""Bytes: 2 layers, 2 key heads of 8 numbers, keys and values, float32."""


def shapes_of(folder: Path, adapter: LoRA = ADAPTER) -> Shapes:
    return make_shapes(read_source(Model(str(folder), None, None)), adapter, HARDWARE, torch.float32, on_cpu=False)


def wide(folder: Path) -> Path:
    """Whose layers the kernel for 4 bits knows: inputs are multiples of 64. No weights."""
    LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=96,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    return folder


def cost(
    shapes: Shapes, prompts: int, group: int, concurrent: int, products: Products = OWN, room: Room | None = None
) -> SamplingCost:
    return sampling_cost(
        shapes, Wanted(assumed_prompts(prompts, 10), group, SAMPLING, 0, ()), concurrent, products, room
    )


def test_the_cache_is_that_of_keys_and_values(tmp_path: Path) -> None:
    found = cost(shapes_of(tiny.save(tmp_path / "m")), 2, 4, 8)
    keys_and_values = 8 * 18 * POSITION
    hidden_and_lengths = found.cache - keys_and_values
    assert 0 <= hidden_and_lengths < 0.2 * keys_and_values
    # A token reads its prompt, and half of the response as it is at the end.
    assert found.read == found.cache * 14 / 18
    assert (found.prompts, found.sequences) == (2, 8)


def test_slots_are_counted_instead_where_steps_are_static(tmp_path: Path) -> None:
    """A prompt once; record and slots in the positions that they are rounded up to."""
    shapes = shapes_of(tiny.save(tmp_path / "m"))
    plain, static = cost(shapes, 2, 4, 8), cost(shapes, 2, 4, 8, room=Room(3, 16, 8, 24))
    assert plain.slots == 0 and static.slots == (3 * 16 + 8 * 24) * POSITION
    assert plain.cache - static.cache == 8 * 18 * POSITION - static.slots
    assert static.read == (2 * 10 + 8 * 4) * POSITION
    # Token ids in 8 bytes, log-probs in 4.
    assert plain.record >= 8 * 8 * 12 and static.record == plain.record * 25 // 8
    # Two prompts' states are there beside the slots.
    assert static.prefill_peak - static.cache > 2 * 10 * POSITION
    assert (static.token, static.logits) == (plain.token, plain.logits)


@pytest.mark.parametrize("window", [6, 64])
def test_slots_keep_what_a_window_has_left_behind(tmp_path: Path, window: int) -> None:
    shapes = shapes_of(tiny_models.save(tmp_path / "m", "gemma3", sliding_window=window))
    static = cost(shapes, 2, 4, 8, room=Room(3, 16, 8, 24))
    assert static.slots == (3 * 16 + 8 * 24) * POSITION
    assert static.slots <= static.cache < 1.2 * static.slots
    assert static.read == POSITION * (2 * 10 + 8 * 4)


def test_all_slots_are_filled_although_the_last_prompt_has_samples_left(tmp_path: Path) -> None:
    """Sub-batch by sub-batch, only whole groups are sampled at once."""
    shapes = shapes_of(tiny.save(tmp_path / "m"))
    plain, static = cost(shapes, 8, 4, 10), cost(shapes, 8, 4, 10, room=Room(8, 16, 10, 24))
    assert (plain.prompts, plain.sequences) == (2, 8) and (static.prompts, static.sequences) == (3, 10)
    assert static.logits == plain.logits * 10 / 8
    of_three = cost(shapes, 3, 4, 12, room=Room(8, 16, 10, 24))
    assert static.prefill_peak == of_three.prefill_peak and static.prefill == of_three.prefill
    assert of_three.sequences == 12 and static.token.flops == pytest.approx(of_three.token.flops * 10 / 12)


def test_prompts_of_an_evaluation_need_their_memory_too(tmp_path: Path) -> None:
    """As many prompts run at once as there are slots, where each has one sample; seconds are those of training."""
    shapes = shapes_of(tiny.save(tmp_path / "m"))
    room = room_for(Wanted(assumed_prompts(8, 10), 1, SAMPLING, 0, ()), 8, ON_CUDA)
    training, evaluation = (cost(shapes, 8, group, 8, room=room) for group in (4, 1))
    found = training.with_memory_for(evaluation)
    before = [each.prefill_peak - each.cache for each in (training, evaluation, found)]
    assert before[1] > 3 * before[0] and before[2] == before[1]
    assert (found.prefill, found.token, found.prompts) == (training.prefill, training.token, 2)


def test_prompts_need_the_memory_of_those_that_run_at_once(tmp_path: Path) -> None:
    """And the work of all."""
    shapes = shapes_of(tiny.save(tmp_path / "m"))
    prompts = assumed_prompts(2 * ON_CUDA.prompt_tokens // 512, 512)
    whole, half = (
        sampling_cost(shapes, Wanted(some, 1, SAMPLING, 0, ()), len(some), OWN, Room(len(some), 512, len(some), 8))
        for some in (prompts, prompts[: len(prompts) // 2])
    )
    assert whole.prompts == 2 * half.prompts and whole.prefill.flops == 2 * half.prefill.flops
    assert whole.cache > 1.9 * half.cache
    assert whole.prefill_peak - whole.cache == half.prefill_peak - half.cache


def test_a_copy_is_not_dequantised(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    shapes = shapes_of(folder, replace(ADAPTER, quantization="nf4"))
    plain = cost(shapes_of(folder), 2, 4, 8)
    own, copied = cost(shapes, 2, 4, 8), cost(shapes, 2, 4, 8, Products(copied=True, decoded_for=64))
    assert own.token.made - copied.token.made == own.prefill.made - copied.prefill.made == 4 * shapes.quantised
    assert copied.token == plain.token and copied.token.decoded == 0
    # Sampling leaves the layers as they were.
    assert cost(shapes, 2, 4, 8) == own


@pytest.mark.parametrize(("rows", "times"), [(8, 1), (64, 1), (65, 2), (MOST_ROWS, 4), (MOST_ROWS + 1, 0)])
def test_products_in_4_bits_decode_for_so_many_rows_and_dequantise_for_more(
    rows: int, times: int, tmp_path: Path
) -> None:
    shapes = shapes_of(wide(tmp_path), replace(ADAPTER, quantization="nf4"))
    room = Room(1, 16, rows, 24)
    own, fused = (cost(shapes, 1, rows, rows, products, room) for products in (OWN, Products(False, 64)))
    assert fused.token.decoded == times * shapes.quantised and fused.token.flops == own.token.flops
    made = own.token.made - fused.token.made
    assert made == (4 * shapes.quantised if times else 0)
    assert own.step > fused.step or rows != 8  # which is too few for anything else to be larger than a weight
    # Prompts run through the model as it is.
    assert fused.prefill == own.prefill and own.prefill.made > 4 * shapes.quantised


def test_layers_that_the_kernel_does_not_know_dequantise(tmp_path: Path) -> None:
    quantised = replace(ADAPTER, quantization="nf4")
    room, fused = Room(1, 16, 4, 24), Products(False, 64)
    # 32 inputs are no multiple of a block's 64.
    narrow = shapes_of(tiny.save(tmp_path / "narrow"), quantised)
    layers = [m for m in narrow.policy.model.modules() if isinstance(m, FourBit)]
    known = sum(m.weight.numel() for m in layers if m.in_features % 64 == 0)
    assert cost(narrow, 1, 4, 4, fused, room).token.decoded == known < narrow.quantised
    dora = shapes_of(wide(tmp_path), replace(quantised, use_dora=True))
    found = cost(dora, 1, 4, 4, fused, room)
    assert found.token.decoded == 0 and found.token.made > 4 * dora.quantised


def test_a_weight_is_decoded_for_as_many_rows_as_the_kernel_takes() -> None:
    pytest.importorskip("triton")
    from dppo_cli.kernels.fused.nf4 import choose

    for name, card in CARDS.items():
        hopper = name.startswith("h")
        assert card.decoded_for == choose((4096,), 4096, MOST_ROWS, 132, wide=not hopper).rows
