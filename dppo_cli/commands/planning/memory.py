"""The memory of a run, part by part and phase by phase, from the shapes of its tensors.

A phase is a time at which certain parts exist together; the peak is the largest phase. On a GPU the number is that of
torch's allocator, as in a run's summary.json; on a CPU it is resident memory of the process.
"""

from dataclasses import dataclass

import torch

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.commands.planning.machine import GPU_RUNTIME, Machine
from dppo_cli.commands.planning.sampling import SamplingCost
from dppo_cli.commands.planning.shapes import NF4_BYTES, Shapes, Source
from dppo_cli.commands.planning.update import UpdateCost
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.kernels.four_bits import BLOCK
from dppo_cli.kernels.memory import WORTH_IT, WORTH_RELEASING
from dppo_cli.kernels.products import has_onednn
from dppo_cli.rollout.engine import in_each_process
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.rollout.refill import KEPT
from dppo_cli.rollout.weights import SHARE, SamplingWeights, decide

GIB, MIB = 2**30, 2**20
AT_RUN_TIME = 64 * MIB
"""Of a CPU: code that oneDNN makes for a machine, threads, and Python objects of a run; measured."""
WORKSPACE = 32 * MIB
"""Of a GPU: what cuBLAS takes from torch's allocator."""
UNUSED = 0.06
"""Share of tensors that come and go which the allocator holds besides: between them, and ahead of them; measured."""
IN_PIECES = 0.25
"""Share of a micro-batch's activations that the C library holds besides, up to what a run returns; measured."""
HOLES, MOST_HOLES = 1.3, 0.8 * GIB
"""The same of a 4-bit base on a CPU, and at most; measured with micro-batches of 256, 512 and 1,536 tokens."""
STATS = 45
"""Bytes of a trained token that are kept until its step ends (`TokenStats`)."""
FILLING = 3
"""Copies of a layer's weight, in float32, that exist while the sampler's copy is made."""


@dataclass(frozen=True)
class Memory:
    """`phases`: bytes of each part in each phase; `least`: of weights, adapter and libraries, however small a batch is;
    `reserve`: bytes that the peak of a run does not include."""

    phases: dict[str, dict[str, float]]
    least: float
    reserve: float
    weights: SamplingWeights

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> float:
        return sum(self.phases[self.peak_phase].values())

    @property
    def parts(self) -> dict[str, float]:
        """The most of each part in any phase. Not all exist together, so their sum is more than the peak."""
        found: dict[str, float] = {}
        for phase in self.phases.values():
            for name, size in phase.items():
                found[name] = max(found.get(name, 0.0), size)
        return found


def sampling_weights(config: TrainConfig, shapes: Shapes, machine: Machine, runtime: float) -> SamplingWeights:
    """What the sampler of `rollout.weights` would choose, with what is free when it does. `runtime`: see `memory`."""
    if not in_each_process(config.rollout):
        return SamplingWeights("adapter", shapes.policy.dtype, False, "")
    before = shapes.base_bytes + (runtime if machine.on_cpu else GPU_RUNTIME)
    kind, dtype = "auto", None
    if isinstance(config.rollout, LocalRollout):
        kind, dtype = config.rollout.weights, config.rollout.dtype
    found = decide(kind, dtype, shapes.policy)
    free = machine.free - before
    needed = shapes.quantised * found.dtype.itemsize
    if kind == "auto" and shapes.quantised:
        why = f"auto: a copy takes {needed / GIB:.1f} GiB of {free / GIB:.1f} GiB free"
        if dtype is None and needed > SHARE * free:
            return SamplingWeights("quantized", found.dtype, False, why)
        return SamplingWeights(found.kind, found.dtype, True, why)
    return found


def memory(
    config: TrainConfig,
    source: Source,
    shapes: Shapes,
    machine: Machine,
    runtime: float,
    weights: SamplingWeights,
    sampling: SamplingCost,
    update: UpdateCost,
) -> Memory:
    """`runtime`: resident bytes of a process that has imported what a run imports."""
    dtype, on_cpu = shapes.policy.dtype, machine.on_cpu
    base_name = f"base weights ({'NF4, rest ' if shapes.quantised else ''}{str(dtype).removeprefix('torch.')})"
    base, trained = shapes.base_bytes, shapes.trained
    always: dict[str, float] = {}
    if on_cpu:
        always["libraries"] = runtime + AT_RUN_TIME
    else:
        always["library workspaces"] = WORKSPACE
    adapter = {"adapter": 4.0 * trained, "gradients": 4.0 * trained, "AdamW moments": _moments(config, shapes)}
    kept = _kept_samples(config, shapes) if on_cpu else 0.0
    copy, filling, packed_head = _copy(shapes, weights, on_cpu)
    # Weights that are not converted are pages of their file: no memory of their own, and some are let go meanwhile.
    stays = dtype == source.file_dtype
    mapped = on_cpu and not shapes.quantised and stays
    adapted = sum(size for _, size in shapes.adapted)
    released = adapted if mapped and weights.copied and adapted >= WORTH_RELEASING else 0
    file = float(source.file_bytes or shapes.parameters * source.file_dtype.itemsize)
    if on_cpu and shapes.quantised and stays:
        # Weights that are not quantised are pages of the file, and keep all of it mapped.
        always["file of the weights"] = max(0.0, file - (shapes.parameters - shapes.quantised) * dtype.itemsize)
    in_4_bits = machine.decoded_for > 0 and sampling.slots > 0 and weights.kind == "quantized"
    scales = {"scales of 4-bit products": 4.0 * shapes.quantised / BLOCK if in_4_bits else 0.0}
    phases = {
        "loading": {
            **always,
            base_name: base,
            **({"file being read": 0.0 if stays else file} if on_cpu else {"layer being read": _layer(shapes)}),
        },
        "sampling": {
            **always,
            **adapter,
            base_name: base - released,
            "sampler's copy of weights": copy + packed_head,
            **scales,
            "KV cache of sampling": float(sampling.cache),
            "logits of sampling": float(sampling.logits + sampling.step),
            "samples": kept + sampling.record,
        },
        "sampling, prompts": {
            **always,
            **adapter,
            base_name: base - released,
            "sampler's copy of weights": copy + packed_head,
            **scales,
            "KV cache of sampling": float(sampling.cache),
            "prompts before sampling": float(sampling.prefill_peak - sampling.cache),
            "samples": kept,
        },
        "update, head": {
            **always,
            **adapter,
            base_name: base,
            "samples": kept,
            "keys and values of prompts": float(update.prompt_states),
            "activations": float(update.activations),
            "head chunk": float(update.head),
        },
        "update, backward": {
            **always,
            **adapter,
            base_name: base,
            "samples": kept,
            "keys and values of prompts": float(update.prompt_states),
            "activations": float(update.activations),
            "buffers of the backward pass": float(update.backward),
        },
        "update, prompts": {
            **always,
            **adapter,
            base_name: base,
            "samples": kept,
            "keys and values of prompts": float(update.prompt_states),
            "activations of prompts": float(update.prompts_backward),
        },
    }
    if weights.copied:
        fill = {base_name: base, "sampler's copy of weights": copy + packed_head, "layer being copied": filling}
        phases["copying weights"] = {**always, **adapter, **fill, "samples": kept}
    if shapes.quantised:
        # One layer at a time, in the forward and in the backward pass: its tensors are counted above.
        for name in ("update, head", "update, backward", "update, prompts"):
            phases[name]["dequantisation buffers"] = shapes.largest_layer * float(dtype.itemsize)
    if 0 < sampling.slots <= KEPT * machine.total and not weights.copied:
        stay = sampling.cache + sampling.logits + sampling.step + sampling.record + sum(scales.values())
        for name, phase in phases.items():
            if name.startswith("update"):
                phase["slots and graphs of sampling, which stay"] = float(stay)
    if not in_each_process(config.rollout):
        del phases["sampling"], phases["sampling, prompts"]
    least = sum(always.values()) + sum(adapter.values()) + base - released
    fixed = {*always, *adapter, *scales, base_name, "samples", "sampler's copy of weights"}
    held = {name: UNUSED * sum(n for part, n in phase.items() if part not in fixed) for name, phase in phases.items()}
    if not on_cpu:
        # What the allocator holds besides is no part of a run's number, but of the card's memory.
        return Memory(phases, least, GPU_RUNTIME + max(held.values()), weights)
    for name in ("update, head", "update, backward"):
        # The C library keeps what the prompts' pass and earlier micro-batches have freed, in pieces that not all fit.
        held[name] += min(update.prompts_backward + IN_PIECES * update.activations, WORTH_IT)
        if shapes.quantised:
            # Dequantised layers come and go between activations that stay, and leave holes.
            held[name] += min(HOLES * update.activations, MOST_HOLES)
    for name, phase in phases.items():
        if name != "loading":
            phase["held free by the allocator"] = held[name]
    return Memory(phases, least, 0.0, weights)


def _moments(config: TrainConfig, shapes: Shapes) -> float:
    """Two of each trained parameter. In 8 bits with a scale for every 256, and small parameters in 32 bits."""
    sizes = [p.numel() for p in shapes.policy.parameters]
    if config.optim.bits == 32:
        return 8.0 * sum(sizes)
    return sum(2 * n * (1 + 4 / 256) if n >= 4096 else 8.0 * n for n in sizes)


def _copy(shapes: Shapes, weights: SamplingWeights, on_cpu: bool) -> tuple[float, float, float]:
    """Bytes of the sampler's copy, of what making it needs besides, and of its output layer in oneDNN's layout."""
    if not weights.copied:
        return 0.0, 0.0, 0.0
    size = weights.dtype.itemsize
    remade = sum(count for count, _ in shapes.adapted)
    # Of weights that are not in 4 bits in training, "quantized" is a copy that is.
    copy = remade * (NF4_BYTES if weights.kind == "quantized" else size)
    if weights.dtype != shapes.policy.dtype:
        copy += (shapes.parameters - remade) * size
    packed = on_cpu and has_onednn(torch.device("cpu"), weights.dtype)
    return float(copy), 4.0 * FILLING * shapes.largest_layer, float(packed * shapes.head_parameters * size)


def _layer(shapes: Shapes) -> float:
    """Weights go to a GPU one by one; before they are quantised they are there in the precision of training."""
    return float(shapes.largest_layer * shapes.policy.dtype.itemsize) if shapes.quantised else 0.0


def _kept_samples(config: TrainConfig, shapes: Shapes) -> float:
    """What is kept of a step's samples until it ends: tokens, reports and statistics."""
    tokens = config.batch.prompts_per_step * config.batch.samples_per_prompt * config.sampling.max_new_tokens
    k = config.approx.num_logprobs
    report = 12 * max(k, 0)
    if k == WHOLE_VOCABULARY:
        report = shapes.policy.head.weight_VH.shape[1] * shapes.policy.dtype.itemsize
    return float(tokens * (13 + report + STATS * config.batch.epochs))
