"""The run's own sampling, on fake tensors: the memory that it holds and the work that it does.

Shapes: B sequences that are written at once, V vocabulary, H hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dppo_cli.commands.planning.recorder import Recorder, Work
from dppo_cli.commands.planning.shapes import FourBit, Shapes
from dppo_cli.kernels.beside import _is_plain
from dppo_cli.kernels.four_bits import BLOCK, MOST_ROWS
from dppo_cli.kernels.low_rank import Restore
from dppo_cli.kernels.slots import Room
from dppo_cli.policy.head import masses
from dppo_cli.rollout.copies import Sampler
from dppo_cli.rollout.decoder import Decoder, PreallocatedLayer, Rows
from dppo_cli.rollout.record import Record
from dppo_cli.rollout.refill import ON_CUDA
from dppo_cli.rollout.sampling import Wanted, draw
from dppo_cli.rollout.static import prefill as run_prompts

MEMORY = ("cache", "slots", "logits", "record", "step", "prefill_peak")
"""Of the fields of a `SamplingCost`."""


@dataclass(frozen=True)
class SamplingCost:
    """Bytes of what is sampled at once: the cache of keys and values, logits and what is drawn from them, what is
    recorded.

    `slots`: of the cache, what is in slots, which may stay while the policy trains. `read`: of the cache, what a token
    reads on average.
    """

    prompts: int  # that run at once
    sequences: int
    cache: int
    slots: int
    read: float
    logits: int
    record: int
    step: int  # what a token needs besides
    prefill_peak: int
    prefill: Work
    token: Work

    @staticmethod
    def elsewhere(prompts: int, sequences: int) -> "SamplingCost":
        """Of servers that sample: nothing here."""
        return SamplingCost(prompts, sequences, 0, 0, 0.0, 0, 0, 0, 0, Work(), Work())

    def with_memory_for(self, other: "SamplingCost") -> "SamplingCost":
        """The same work, with memory for either."""
        return replace(self, **{name: max(getattr(self, name), getattr(other, name)) for name in MEMORY})


@dataclass(frozen=True)
class Products:
    """How the sampler multiplies with weights that are in 4 bits in training.

    `copied`: with a copy of them in another precision. `decoded_for`: by the kernel of `fused.nf4`, which decodes a
    weight once for so many rows; 0: each product dequantises its weight.
    """

    copied: bool
    decoded_for: int

    def fused(self, rows: int) -> bool:
        return not self.copied and self.decoded_for > 0 and rows <= MOST_ROWS


def sampling_cost(
    shapes: Shapes, wanted: Wanted, concurrent: int, products: Products, room: Room | None = None
) -> SamplingCost:
    """Of `concurrent` sequences at most: the prompts, and the last token, which attends to all others.

    `room`: of keys and values, for all calls of the run, where the engine takes static steps. Then all slots are filled
    at once; the work of a token is about the same.
    """
    policy, recorder, group = shapes.policy, Recorder(shapes.tensors()), wanted.group
    tokens = wanted.sampling.max_new_tokens
    at_once = max(1, concurrent // group) if room is None else -(-concurrent // group)
    prompts = wanted.prompts[:at_once]
    size = len(prompts) * group
    rows = size if room is None else min(size, concurrent)
    slots, training = 0, policy.model.training
    policy.model.eval()
    with shapes.mode, recorder, torch.no_grad(), policy.autocast(), _copied(shapes, products):
        head = policy.head.at(wanted.sampling.temperature or 1.0)
        decoder = Decoder(policy.model, prompts, group, tokens, policy.pad_id)
        hidden_BH = decoder.prefill()
        prefill_peak, cache, prefill = recorder.restart_peak(), recorder.live, recorder.work
        held, position = _states(decoder)
        read = cache * (decoder.width + tokens / 2) / decoder.capacity
        if rows < size:
            none = torch.arange(0)
            decoder.keep(Rows(torch.arange(rows), none, none))
            hidden_BH = hidden_BH[:rows]
        record = Record(rows, tokens, head, wanted.num_logprobs)
        buffer_BV = hidden_BH.new_empty(rows, head.weight_VH.shape[0], dtype=torch.float32)
        before, of_prompts = recorder.live, recorder.work
        recorder.restart_peak()
        logits_BV, mass_BV, total_B1 = masses(head.tempered(head.product(hidden_BH)), buffer_BV)
        token_B = draw(mass_BV, torch.empty(rows))
        logits_peak = recorder.restart_peak() - before + buffer_BV.nbytes
        with_logits = recorder.live
        record.add(torch.arange(rows), token_B, logits_BV, total_B1.log(), hidden_BH)
        kept = recorder.live - with_logits
        del logits_BV, mass_BV, total_B1
        _at_the_end(decoder)
        recorder.restart_peak()
        start = recorder.live
        with _fused(shapes, products, recorder, rows):
            decoder.step(token_B)
        step, token = recorder.peak - start, recorder.work.less(of_prompts)
        if room is not None:
            slots = position * room.all_positions
            cache += slots - held
            # Neighbouring samples of a prompt read its keys and values together.
            read = position * (sum(len(prompt.token_ids) for prompt in prompts) + rows * tokens / 2)
            kept = kept * (room.positions + 1) // tokens
            del decoder
            recorder.restart_peak()
            start, before_prompts = recorder.live, recorder.work
            sampler = Sampler(policy.model, head, head.product, policy.autocast)
            # While the slots of the step before are there.
            for part in ON_CUDA.parts(prompts):
                run_prompts(sampler, part, policy.pad_id, policy.device)
            prefill_peak, prefill = cache + recorder.peak - start, recorder.work.less(before_prompts)
    policy.model.train(training)
    return SamplingCost(len(prompts), rows, cache, slots, read, logits_peak, kept, step, prefill_peak, prefill, token)


def _states(decoder: Decoder) -> tuple[int, int]:
    """Bytes of all keys and values, and of those of one position of one sequence."""
    held = position = 0
    layers: list[Any] = decoder.cache.layers
    for layer in layers:
        for shown, states in zip((layer.keys, layer.values), getattr(layer, "buffers", (None, None)), strict=True):
            held += shown.nbytes if states is None else states.nbytes
            position += shown.nbytes // (shown.shape[0] * shown.shape[2])
    return held, position


def _at_the_end(decoder: Decoder) -> None:
    """Go on as if all tokens but the last were written."""
    layers = decoder.cache.layers
    if all(isinstance(layer, PreallocatedLayer) for layer in layers):
        for layer in layers:
            assert isinstance(layer, PreallocatedLayer)
            layer._show(decoder.capacity - 1)
        decoder.written = decoder.capacity - decoder.width - 1


@contextmanager
def _copied(shapes: Shapes, products: Products) -> Iterator[None]:
    """Within it, products with weights in 4 bits make nothing of them, if there is a copy of these weights."""
    layers = [m for m in shapes.policy.model.modules() if isinstance(m, FourBit)] if products.copied else []
    with _restored(layers, lambda weight: weight):
        yield


@contextmanager
def _fused(shapes: Shapes, products: Products, recorder: Recorder, rows: int) -> Iterator[None]:
    """Within it, products with weights in 4 bits decode them, where the kernel of `fused.nf4` knows the layer."""

    def decoded(weight_OI: Tensor) -> Tensor:
        recorder.decoded += weight_OI.numel() * -(-rows // products.decoded_for)
        return weight_OI

    modules: Iterable[Any] = shapes.policy.model.modules() if products.fused(rows) else ()
    bases = [module.get_base_layer() for module in modules if _is_plain(module)]
    known = [m for m in bases if isinstance(m, FourBit) and m.in_features % BLOCK == 0 and m.out_features % 8 == 0]
    with _restored(known, decoded):
        yield


@contextmanager
def _restored(layers: Sequence[FourBit], restore: Restore) -> Iterator[None]:
    for layer in layers:
        layer.restore = restore
    try:
        yield
    finally:
        for layer in layers:
            del layer.restore
