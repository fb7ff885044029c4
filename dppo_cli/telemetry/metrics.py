"""The figures of a step: what was sampled, what the updates did, how long each phase took, how much memory."""

import math
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dppo_cli.config import TrainConfig
from dppo_cli.learner import UpdateResult
from dppo_cli.telemetry.trust_region import step_metrics
from dppo_cli.types import Completion, Sample


class PhaseTimer:
    """Seconds per named phase of a step."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def seconds_and_rates(self, completions: Sequence[Completion], updates: Sequence[UpdateResult]) -> dict[str, float]:
        """Seconds of each phase and of the step so far; sampled tokens per second of rollout, and of the whole step."""
        total = time.perf_counter() - self.started
        tokens = sum(len(c.token_ids_T) for c in completions)
        rates = {"rollout_tokens_per_second": tokens / self.seconds["rollout"], "tokens_per_second": tokens / total}
        return {**self.seconds, "total": total, **rates}


def rollout_metrics(samples: Sequence[Sample], config: TrainConfig) -> dict[str, Any]:
    """Rewards and lengths of a step's samples. `equal_groups`: share of prompts whose samples all got one reward."""
    judged = [s.reward for s in samples if not math.isnan(s.reward)]
    lengths = [len(s.completion.token_ids_T) for s in samples]
    group = config.batch.samples_per_prompt
    groups = [samples[i : i + group] for i in range(0, len(samples), group)]
    return {
        "reward": sum(judged) / len(judged) if judged else None,
        "accuracy": sum(r >= config.eval.success_reward for r in judged) / len(judged) if judged else None,
        "unjudged": 1 - len(judged) / len(samples),
        "equal_groups": sum(all(s.advantage == 0 for s in g) for g in groups) / len(groups),
        "prompt_tokens": sum(len(s.completion.prompt.token_ids) for s in samples) / len(samples),
        "response_tokens": sum(lengths) / len(lengths),
        "response_tokens_max": max(lengths),
        "finished": sum(s.completion.finished for s in samples) / len(samples),
    }


def update_metrics(updates: Sequence[UpdateResult]) -> dict[str, Any]:
    """The trust region's figures and the optimizer's. `padding`: share of places in micro-batches without a token."""
    places = sum(u.places for u in updates)
    return {
        **step_metrics([u.stats for u in updates]),
        "gradient_norm": sum(u.gradient_norm for u in updates) / len(updates),
        "lr": updates[-1].lr,
        "skipped": sum(u.skipped_sequences for u in updates) / sum(u.sequences for u in updates),
        "padding": sum(u.padded_places for u in updates) / places if places else 0.0,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: of the GPU where there is one, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":
        # Not getrusage, whose maximum begins with that of the process that started this one.
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
