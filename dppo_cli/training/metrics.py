"""A line of metrics.jsonl: what was sampled, what the updates did, how long each phase took.

Mask fractions are over tokens with A != 0, split by the sign of A. Shapes: N tokens.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from dppo_cli.rollout.collect import Collected
from dppo_cli.training.trainer import UpdateResult
from dppo_cli.types import Status, TokenStats

QUANTILES = (0.5, 0.9, 0.99, 1.0)
COST = ("time", "memory")
"""The parts of a line that say what a step cost. In all others a run that was resumed equals an undisturbed one."""


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

    def seconds_and_rates(self, collected: Collected) -> dict[str, float | None]:
        """Seconds of each phase and of the step so far; sampled tokens per second of rollout, and of the whole step.

        The former is None where sampling went on while the trainer did not wait for it.
        """
        total = time.perf_counter() - self.started
        tokens = sum(len(c.mu.logp_N) for group in collected.sampled for c in group.completions)
        sampling = tokens / self.seconds["rollout"] if collected.waited else None
        return {
            **self.seconds,
            "total": total,
            "rollout_tokens_per_second": sampling,
            "tokens_per_second": tokens / total,
        }


def rollout_metrics(collected: Collected, step: int, success_reward: float) -> dict[str, Any]:
    """Rewards and lengths of all that a step has sampled. `equal_groups`: share of groups whose samples all have A = 0.

    `staleness`: by how many steps the policy is ahead of the versions that sampled, on average; 0 when in step.

    `turns` and `reply_tokens`: of a response, how often the model spoke, and the tokens that an environment said.

    `reward_parts`: of a mixture, the mean of each member by its name. `sampled_groups` and `sampling_rounds` say what
    replacing equal groups has cost.
    """
    groups = collected.sampled
    scores = [score.value for group in groups for score in group.scores]
    judged = [value for value in scores if value is not None]
    completions = [c for group in groups for c in group.completions]
    prompt_lengths = [len(group.prompt.token_ids) for group in groups for _ in group.completions]
    lengths = [len(c.token_ids_T) for c in completions]
    parts: dict[str, list[float]] = {}
    for group in groups:
        for score in group.scores:
            for name, value in score.parts.items():
                parts.setdefault(name, []).extend([] if value is None else [value])
    return {
        "reward": _mean_of(judged),
        "reward_parts": {name: _mean_of(values) for name, values in parts.items()},
        "accuracy": _mean_of([value >= success_reward for value in judged]),
        "unjudged": 1 - len(judged) / len(scores) if scores else None,
        "equal_groups": _mean_of([not any(group.advantages) for group in groups]),
        "sampled_groups": len(groups),
        "sampling_rounds": collected.rounds,
        "staleness": _mean_of([step - 1 - version for c in completions for version in c.versions]),
        "prompt_tokens": _mean_of(prompt_lengths),
        "response_tokens": _mean_of(lengths),
        "response_tokens_max": max(lengths, default=0),
        "turns": _mean_of([c.turns for c in completions]),
        "reply_tokens": _mean_of([len(c.token_ids_T) - len(c.mu.logp_N) for c in completions]),
        "finished": _mean_of([c.status is Status.FINISHED for c in completions]),
    }


def update_metrics(updates: Sequence[UpdateResult]) -> dict[str, Any]:
    """The trust region's figures and the optimizer's. `padding`: share of positions that ran without a token."""
    positions = sum(u.num_positions for u in updates)
    sequences = sum(u.sequences for u in updates)
    return {
        **token_metrics([u.stats for u in updates]),
        "gradient_norm": _mean_of([u.gradient_norm for u in updates if u.gradient_norm is not None]),
        "lr": updates[-1].lr if updates else None,
        "skipped": sum(u.skipped_sequences for u in updates) / sequences if sequences else 0.0,
        "padding": sum(u.num_padding for u in updates) / positions if positions else 0.0,
    }


def token_metrics(updates: Sequence[Sequence[TokenStats]]) -> dict[str, Any]:
    """The trust region's figures of one step, from the token statistics of each of its updates.

    `mismatch_*` is |pi - mu| at the first update, where pi has not moved yet: what the rollout engine and the trainer
    disagree on. `shift_*` is |pi - mu| over all updates. `filtered` is the share of tokens with A != 0 that the
    off-policy filter dropped; `undecided` that for which the divergence's other bound gives another mask, None where it
    has none. Empty updates (every sample skipped) count for nothing; a step
    without any token gives None throughout.
    """
    parts = [part for update in updates for part in update]
    names = [
        "mismatch_mean",
        "shift_mean",
        "shift_max",
        "masked_positive",
        "masked_negative",
        "filtered",
        "undecided",
        "entropy",
        "reference_kl",
    ]
    names += [f"{kind}_p{round(100 * q)}" for kind in ("divergence", "ratio") for q in QUANTILES] + ["ratio_p1"]
    if not parts:
        return dict.fromkeys(names)
    seen = TokenStats.cat(parts)
    shift_N = (seen.pi_N - seen.mu_N).abs()
    ratio_N = seen.log_ratio_N.exp()
    first = next(update for update in updates if update)
    start = TokenStats.cat(first) if first is updates[0] else None
    found: dict[str, Any] = {
        "mismatch_mean": _mean((start.pi_N - start.mu_N).abs()) if start else None,
        "shift_mean": _mean(shift_N),
        "shift_max": float(shift_N.max()),
        "masked_positive": _mean((~seen.keep_N[seen.advantage_N > 0]).float()),
        "masked_negative": _mean((~seen.keep_N[seen.advantage_N < 0]).float()),
        "filtered": _mean(seen.filtered_N[seen.advantage_N != 0].float()),
        "undecided": None if seen.undecided_N is None else _mean(seen.undecided_N[seen.advantage_N != 0].float()),
        "entropy": _mean(seen.entropy_N),
        "reference_kl": _mean(seen.reference_kl_N),
    }
    for q in QUANTILES:
        found[f"divergence_p{round(100 * q)}"] = _quantile(seen.divergence_N, q)
        found[f"ratio_p{round(100 * q)}"] = _quantile(ratio_N, q)
    found["ratio_p1"] = _quantile(ratio_N, 0.01)
    return found


def _mean_of(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _mean(value_N: Tensor) -> float | None:
    return float(value_N.mean()) if value_N.numel() else None


def _quantile(value_N: Tensor, q: float) -> float:
    # Nearest rank by kthvalue, because torch.quantile refuses more than 16 million values.
    return float(value_N.kthvalue(max(1, math.ceil(q * value_N.numel()))).values)
