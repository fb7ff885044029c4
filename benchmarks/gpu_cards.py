"""Steps of gpu.py: what docs/gpu.md plans for cards of 16, 24 and 80 GB, within their memory."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch
from gpu_decode import Forced
from gpu_model import config
from gpu_steps import BF16, NF4, Bench, groups_of, prompts_of

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout import refill, weights

CARDS: dict[str, tuple[tuple[str, ...], tuple[str, ...], float | None]] = {
    "gpu_16gb": (NF4, ("adapter=qlora", "hardware=gpu_16gb", "rollout=local_16gb"), 15.6),
    "gpu_24gb": (NF4, ("adapter=qlora", "hardware=gpu_24gb", "rollout=local_24gb"), 22.0),
    "gpu_80gb": (BF16, ("adapter=lora", "hardware=gpu_80gb", "rollout=local_80gb"), None),
}
"""The policy, which is that of other steps; the options; GiB that a program sees of the card, None: of this one."""


def card(bench: Bench, name: str) -> None:
    """Responses of the usual length, and of four times that."""
    of, words, gib = CARDS[name]
    bench.policy(of)  # in 16 bits before it is quantised, which needs more than a small card has
    bench.collect()
    with limited(bench.device, gib):
        for new in (bench.size.new, 4 * bench.size.new):
            sample_and_update(bench, name, bench.policy(of), config(replace(bench.size, new=new), *words))


def sample_and_update(bench: Bench, name: str, of: Policy, settings: TrainConfig) -> None:
    """With all slots in use, each prompt its own as in an evaluation; and with a group of samples.

    Slots have room for whole responses, of which the first tokens are sampled. They stay while the policy trains if
    they would on the card.
    """
    size, slots, sampling = bench.size, settings.rollout.concurrent_sequences, settings.sampling
    short, lengths = max(1, size.new // 8), f"{size.prompt} + {sampling.max_new_tokens}"
    prompts = prompts_of(size, slots, size.prompt)
    groups = groups_of(size, prompts[:1], sampling.max_new_tokens)
    learner = make_learner(of, settings, print)
    with patch.object(refill, "StaticSequences", Forced), settings.rollout.load(of, print) as engine:
        print(f"{name}: {engine.samples_with}", flush=True)
        engine.sync(version=0)
        engine.refilling = refill.Refilling(of, slots, print)  # on a CPU, too

        def sample() -> None:
            Forced.lengths = itertools.repeat(short)
            for _ in engine.generate(prompts, 1, sampling, settings.approx.num_logprobs, seed=1):
                pass

        twice(bench, f"{name}, {short} tokens of each of {slots} sequences of {lengths}", sample)
        twice(bench, f"{name}, update of {size.group} sequences of {lengths}", lambda: learner.update(groups))


def twice(bench: Bench, what: str, work: Callable[[], object]) -> None:
    """Seconds of the second time; the higher of both peaks."""
    (first, peak), (seconds, again) = bench.timed(work), bench.timed(work)
    bench.add(what, seconds=seconds, first_s=first, peak_gib="" if peak is None or again is None else max(peak, again))


@contextmanager
def limited(device: torch.device, gib: float | None) -> Iterator[None]:
    """No more memory than that, also for what is decided by the memory that is free, or that there is."""
    if device.type != "cuda" or gib is None:
        yield
        return
    cap, total = gib * 2**30, torch.cuda.get_device_properties(device).total_memory

    def free(_: torch.device) -> int:
        return int(cap - torch.cuda.memory_reserved(device))

    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    try:
        with patch.object(weights, "_free_bytes", free), patch.object(refill, "KEPT", refill.KEPT * cap / total):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {name: (60, partial(card, name=name)) for name in CARDS}
"""As in gpu_steps.py."""
