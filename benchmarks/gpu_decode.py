"""Steps of gpu.py about decoding: CUDA graphs, the attention over slots, and slots that are filled again."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from gpu_model import config
from gpu_steps import BF16, NF4, Bench, prompts_of
from torch import Tensor

from dppo_cli.config.sections import Sampling
from dppo_cli.kernels import slots
from dppo_cli.kernels.graphs import Graphs
from dppo_cli.kernels.slots import Room
from dppo_cli.rollout import refill
from dppo_cli.rollout.local import LocalEngine
from dppo_cli.rollout.refill import ON_CUDA, Refilling
from dppo_cli.rollout.static import StaticSequences
from dppo_cli.types import Prompt

MEAN, SPREAD = 0.4, 1.0
"""Of the lengths in `refilled`: log-normal, with this mean as a share of `size.new`, and this deviation of the log."""


class Called(Graphs):
    """No graphs: the same steps, kernel by kernel."""

    def __init__(self, device: torch.device, warn: Callable[[str], None]) -> None:
        super().__init__(device, warn)
        self.records = False


Ways = Mapping[str, tuple[type[Graphs], dict[str, Any]]]
"""By name: graphs, and what functions of kernels/slots.py answer instead of the truth."""


@contextmanager
def static_engine(bench: Bench, words: tuple[str, ...], slots: int, graphs: type[Graphs]) -> Iterator[LocalEngine]:
    """Samples with static steps on every device."""
    of = bench.policy(words)
    with config(bench.size, *words).rollout.load(of, print) as engine:
        engine.sync(version=0)
        engine.refilling = Refilling(of, slots, print)
        engine.refilling.graphs = graphs(bench.device, print)
        yield engine


def seconds_of(
    bench: Bench, engine: LocalEngine, prompts: Sequence[Prompt], group: int, tokens: int, k: int, once: bool = False
) -> Any:
    """Of a call, of the same once more unless `once`, and the peak of memory then. The first records the graphs."""
    sampling = Sampling(1.0, 1.0, 0, 0.0, tokens, [])

    def run() -> None:
        for _ in engine.generate(prompts, group, sampling, k, seed=1):
            pass

    first, peak = bench.timed(run)
    second, peak = (first, peak) if once else bench.timed(run)
    return first, second, peak


GRAPHS: Ways = {"graphs": (Graphs, {})}
OTHERS: Ways = {
    "graphs, torch's flash attention": (Graphs, {"without_triton": lambda *_: ""}),
    "graphs, masked attention": (Graphs, {"has_flash": lambda *_: False}),
    "no graphs": (Called, {}),
}


def static_steps(bench: Bench, words: tuple[str, ...], name: str, num_logprobs: int = 0, ways: Ways = GRAPHS) -> None:
    """Milliseconds of a step in each of the ways: for each number of rows with graphs alone, else for one."""
    size = bench.size
    width = size.prompt + (size.new - size.decoded) // 2
    layer_bytes = 0.516 if config(size, *words).adapter.quantization else 2.0
    for kind, (graphs, answers) in ways.items():
        for rows in size.rows if ways is GRAPHS and not num_logprobs else size.rows[1:2]:
            group = min(size.group, rows)
            prompts = prompts_of(size, rows // group, width)
            other = patch.multiple(slots, **answers) if answers else nullcontext()
            with other, static_engine(bench, words, rows, graphs) as engine:
                _, prefill, _ = seconds_of(bench, engine, prompts, group, 1, num_logprobs)
                first, second, peak = seconds_of(bench, engine, prompts, group, size.decoded, num_logprobs)
            step = (second - prefill) / (size.decoded - 1)
            weights = size.layer_parameters * layer_bytes + 2 * size.head_parameters
            read, shared = (
                weights + (prompt_rows * width + rows * size.decoded / 2) * size.cache_bytes
                for prompt_rows in (rows, rows // group)
            )
            bench.add(
                f"{name}, {kind}, {rows} rows" + (f", top-{num_logprobs}" if num_logprobs else ""),
                ms_per_step=1e3 * step,
                tokens_per_s=rows / step,
                prefill_s=prefill,
                recording_s=first - second,
                share_of_floor=read / bench.copy_bandwidth() / step,
                share_with_prompts_once=shared / bench.copy_bandwidth() / step,
                peak_gib="" if peak is None else peak,
            )


class Noted(StaticSequences):
    """`made`: the room of each that was made, and its bytes."""

    made: list[tuple[Room, int]]

    def __init__(self, *of: Any) -> None:
        super().__init__(*of)
        self.made.append((self.room, self.num_bytes))


def long_prompts(bench: Bench, words: tuple[str, ...] = BF16) -> None:
    """Prompts eight times as long as in the other steps: the time, and the memory that storing them once saves."""
    size = bench.size
    prompts = prompts_of(size, size.prompts, 8 * size.prompt)
    rows, tokens = size.prompts * size.group, size.new // 2
    Noted.made = []
    with patch.object(refill, "StaticSequences", Noted), static_engine(bench, words, rows, Graphs) as engine:
        _, prefill, _ = seconds_of(bench, engine, prompts, size.group, 1, 0)
        first, second, peak = seconds_of(bench, engine, prompts, size.group, tokens, 0)
    room, taken = Noted.made[-1]
    each = taken / room.all_positions
    bench.add(
        f"long prompts, {size.prompts} x {size.group} samples of {8 * size.prompt} + {tokens} tokens",
        ms_per_step=1e3 * (second - prefill) / (tokens - 1),
        prefill_s=prefill,
        recording_s=first - second,
        slots_gib=taken / 2**30,
        slots_gib_unshared=each * room.slots * (room.prompt_positions + room.positions) / 2**30,
        peak_gib="" if peak is None else peak,
    )


class Forced(StaticSequences):
    """Sequences end after the numbers of tokens in `lengths`, in the order in which they get a slot."""

    lengths: Iterator[int]

    def put(self, slot_N: Tensor, *of: Any) -> None:
        if not hasattr(self, "limit_S"):
            self.limit_S = torch.zeros_like(self.step_S)
        super().put(slot_N, *of)
        self.limit_S[slot_N] = torch.tensor([next(self.lengths) for _ in slot_N], device=slot_N.device)

    def move(self, from_M: Tensor, to_M: Tensor, width: int) -> None:
        super().move(from_M, to_M, width)
        self.limit_S[to_M] = self.limit_S[from_M]

    def step(self, rows: int, width: int) -> None:
        super().step(rows, width)
        self.writing_S[:rows] &= self.step_S[:rows] < self.limit_S[:rows]


def refilled(bench: Bench, words: tuple[str, ...] = BF16) -> None:
    """Four times as many sequences as slots, with a long tail of lengths: refilled, and a batch after the other."""
    size = bench.size
    rows, most = size.rows[1], 2 * size.new
    prompts = prompts_of(size, 4 * rows // size.group, size.prompt)
    generator = torch.Generator().manual_seed(3)
    logs = torch.randn(4 * rows, generator=generator) * SPREAD + math.log(MEAN * size.new) - SPREAD**2 / 2
    lengths = [int(n) for n in logs.exp().clamp(1, most)]
    sampling = Sampling(1.0, 1.0, 0, 0.0, most, [])
    at_once = rows // size.group
    with (
        patch.object(refill, "StaticSequences", Forced),
        static_engine(bench, words, rows, Graphs) as engine,
    ):

        def run(parts: Sequence[Sequence[Prompt]]) -> None:
            Forced.lengths = iter(lengths)
            for part in parts:
                for _ in engine.generate(part, size.group, sampling, 0, seed=1):
                    pass

        waves = [prompts[start : start + at_once] for start in range(0, len(prompts), at_once)]
        run([prompts[:at_once]])  # records graphs; others are recorded in both runs, if they do not stay
        for name, parts in (("refilled", [prompts]), ("batch after batch", waves)):
            seconds, peak = bench.timed(lambda parts=parts: run(parts))
            bench.add(
                f"long-tailed lengths, {len(lengths)} sequences in {rows} slots, {name}",
                seconds=seconds,
                tokens_per_s=sum(lengths) / seconds,
                longest=max(lengths),
                peak_gib="" if peak is None else peak,
            )


def blocks(bench: Bench, words: tuple[str, ...] = BF16) -> None:
    """What looking less often, and a block ahead, saves."""
    size = bench.size
    rows = size.rows[1]
    prompts = prompts_of(size, rows // size.group, size.prompt)
    for steps, ahead in ((1, 0), (8, 0), (8, 1)):
        with static_engine(bench, words, rows, Graphs) as engine:
            assert engine.refilling is not None
            engine.refilling.pace = replace(ON_CUDA, steps=steps, ahead=ahead)
            _, seconds, _ = seconds_of(bench, engine, prompts, size.group, size.decoded, 0)
        bench.add(f"looking every {steps} steps, {ahead} ahead, {rows} rows", seconds=seconds)


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "static": (60, lambda b: static_steps(b, BF16, "static step, bf16 + LoRA")),
    "static_ways": (60, lambda b: static_steps(b, BF16, "static step, bf16 + LoRA", ways=OTHERS)),
    "static_topk": (30, lambda b: static_steps(b, BF16, "static step, bf16 + LoRA", 20)),
    "refill": (60, refilled),
    "long": (30, long_prompts),
    "blocks": (20, blocks),
    "static_nf4": (60, lambda b: static_steps(b, NF4, "static step, NF4 + LoRA")),
}
"""As in gpu_steps.py; those of BF16 first, because two policies would not fit."""
