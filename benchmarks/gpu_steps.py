"""The steps of gpu.py: each measures one thing on one device and adds rows to its table."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from gpu_model import Size, config, policy
from measure import BUILD

from dppo_cli.commands.assembly import make_learner
from dppo_cli.config.sections import Sampling
from dppo_cli.kernels.devices import empty_cache
from dppo_cli.policy.forward import Forward, SharedPrompts, WholeSequences
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.types import Completion, Example, Group, PolicyReport, Prompt, Score, Status

BF16, NF4 = ("adapter=lora", "hardware=gpu_80gb"), ("adapter=qlora", "hardware=gpu_24gb", "rollout.weights=quantized")
NF4_KEPT = ("adapter=qlora", "hardware=gpu_80gb", "rollout.weights=quantized")


@dataclass
class Bench:
    """What the steps share. `policies`: at most one, the last that was asked for."""

    size: Size
    device: torch.device
    rows: list[dict[str, Any]] = field(default_factory=list)
    out: Path = BUILD
    bandwidth: float | None = None
    policies: dict[tuple[str, ...], Policy] = field(default_factory=dict)

    def policy(self, words: tuple[str, ...]) -> Policy:
        """Two of them would not fit."""
        if words not in self.policies:
            self.forget()
            self.policies[words] = policy(self.size, self.device, config(self.size, *words))
        return self.policies[words]

    def forget(self) -> None:
        self.policies.clear()
        self.collect()

    def collect(self) -> None:
        """Give back what nothing needs any more."""
        gc.collect()
        empty_cache(self.device)

    def add(self, what: str, **values: float | str) -> None:
        self.rows.append({"what": what, **values})
        print(what, values, flush=True)

    def timed(self, work: Callable[[], object]) -> tuple[float, float | None]:
        """Seconds, and the peak of the device's memory in GiB meanwhile; None where it has no counter."""
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start, self.peak()

    def peak(self) -> float | None:
        """GiB since the last `timed` began, also of work that failed."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else None

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written."""
        if self.bandwidth is None:
            data = torch.ones(2**28 if self.device.type == "cuda" else 2**20, device=self.device)
            data.clone()
            self.bandwidth = 2 * data.nbytes / min(self.timed(data.clone)[0] for _ in range(5))
        return self.bandwidth


def prompts_of(size: Size, count: int, tokens: int) -> list[Prompt]:
    """No two begin alike: nothing is shared between prompts."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, size.model["vocab_size"], (count, tokens), generator=generator).tolist()
    return [Prompt(i, Example("", ""), tuple(row)) for i, row in enumerate(ids)]


def probe(bench: Bench) -> None:
    """Versions, attention kernels that are on, bandwidth."""
    cuda = torch.backends.cuda

    def kernels() -> str:
        names = ("flash", "mem_efficient", "cudnn", "math")
        return " ".join(name for name in names if getattr(cuda, f"{name}_sdp_enabled")())

    before = kernels()
    bench.policy(BF16)  # its settings are those of every run
    bench.add(
        "probe",
        attention_before=before,
        attention=kernels(),
        cuda=str(torch.version.cuda),
        cudnn=str(torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None),
        copy_gb_per_s=bench.copy_bandwidth() / 1e9,
    )


def decode(bench: Bench, words: tuple[str, ...], name: str, num_logprobs: int = 0) -> None:
    """Tokens per second of the in-process engine, and the share of the floor."""
    size, of, settings = bench.size, bench.policy(words), config(bench.size, *words)
    width = size.prompt + (size.new - size.decoded) // 2
    with settings.rollout.load(of, print) as engine:
        engine.sync(version=0)
        for rows in size.rows if num_logprobs == 0 else size.rows[1:2]:
            group = min(size.group, rows)
            prompts = prompts_of(size, rows // group, width)

            def run(tokens: int, prompts: Sequence[Prompt] = prompts, group: int = group) -> tuple[float, float | None]:
                sampling = Sampling(1.0, 1.0, 0, 0.0, tokens, [])
                return bench.timed(lambda: in_order(engine.generate(prompts, group, sampling, num_logprobs, seed=1)))

            # The first of each is a warm-up, which on CUDA records the graphs for so many tokens.
            (_, (prefill, _)), (_, (seconds, peak)) = ((run(n), run(n)) for n in (1, size.decoded))
            step = (seconds - prefill) / (size.decoded - 1)
            layer_bytes = 0.516 if settings.adapter.quantization else 2.0
            read = size.layer_parameters * layer_bytes + 2 * size.head_parameters
            read += rows * (width + size.decoded / 2) * size.cache_bytes
            bench.add(
                f"{name}, {rows} rows" + (f", top-{num_logprobs}" if num_logprobs else ""),
                ms_per_step=1e3 * step,
                tokens_per_s=rows / step,
                prefill_s=prefill,
                share_of_floor=read / bench.copy_bandwidth() / step,
                peak_gib=or_nothing(peak),
            )


def groups_of(size: Size, prompts: Sequence[Prompt], new: int) -> list[Group]:
    """Random responses as if a uniform policy had sampled them; every advantage is 1 or -1, so that none is skipped."""
    generator, vocabulary = torch.Generator().manual_seed(2), size.model["vocab_size"]
    made = []
    for prompt in prompts:
        row = []
        for ids_T in torch.randint(3, vocabulary, (size.group, new), generator=generator):
            mu = PolicyReport(torch.full((new,), -torch.tensor(float(vocabulary)).log().item()))
            row.append(Completion(ids_T, torch.ones(new, dtype=torch.bool), mu, "", Status.CUT, (0,)))
        signs = [1.0 if i % 2 else -1.0 for i in range(size.group)]
        made.append(Group(prompt, row, [Score(s) for s in signs], signs))
    return made


def update(bench: Bench, words: tuple[str, ...], name: str, forward: type[Forward] | None = None) -> None:
    """Seconds of an update, the second of two, and its peak memory. `forward`: instead of the one that runs choose."""
    size, settings = bench.size, config(bench.size, *words)
    learner = make_learner(bench.policy(words), settings, print)
    learner.forward = forward
    groups = groups_of(size, prompts_of(size, size.prompts, size.prompt), size.new)
    first, _ = bench.timed(lambda: learner.update(groups))
    seconds, peak = bench.timed(lambda: learner.update(groups))
    bench.add(
        f"{name}, {size.prompts} x {size.group} x ({size.prompt} + {size.new})",
        seconds=seconds,
        first_s=first,
        tokens_per_s=size.prompts * size.group * size.new / seconds,
        peak_gib=or_nothing(peak),
    )


def step(bench: Bench) -> None:
    """Sampling, scoring by nothing, and one update: the work that TRL's step does."""
    size, settings = bench.size, config(bench.size, *BF16)
    of = bench.policy(BF16)
    learner = make_learner(of, settings, print)
    prompts = prompts_of(size, size.prompts, size.prompt)

    def run() -> None:
        with settings.rollout.load(of, print) as engine:
            engine.sync(version=0)
            sampled = in_order(
                engine.generate(prompts, size.group, settings.sampling, settings.approx.num_logprobs, seed=4)
            )
        signs = [1.0 if i % 2 else -1.0 for i in range(size.group)]
        scores = [Score(sign) for sign in signs]
        learner.update([Group(p, row, scores, signs) for p, row in zip(prompts, sampled, strict=True)])

    seconds, peak = bench.timed(run)
    bench.add("whole step, bf16 LoRA", seconds=seconds, peak_gib=or_nothing(peak))


def or_nothing(peak: float | None) -> float | str:
    return "" if peak is None else peak


STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "probe": (40, probe),
    "decode": (90, lambda b: decode(b, BF16, "decode, bf16 + LoRA")),
    "topk": (40, lambda b: decode(b, BF16, "decode, bf16 + LoRA", 20)),
    "update": (60, lambda b: update(b, BF16, "update, bf16 LoRA")),
    "update_shared": (60, lambda b: update(b, BF16, "update, bf16 LoRA, prompts first", SharedPrompts)),
    "step": (60, step),
    "decode_nf4": (120, lambda b: decode(b, NF4, "decode, NF4 + LoRA")),
    "topk_nf4": (50, lambda b: decode(b, NF4, "decode, NF4 + LoRA", 20)),
    "update_nf4": (70, lambda b: update(b, NF4, "update, QLoRA, recomputing")),
    "update_nf4_whole": (90, lambda b: update(b, NF4, "update, QLoRA, recomputing, not packed", WholeSequences)),
    "update_nf4_kept": (70, lambda b: update(b, NF4_KEPT, "update, QLoRA, nothing recomputed")),
}
"""Seconds a step may take, and its work; those of one base one after the other."""
