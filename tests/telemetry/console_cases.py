"""What tests of the console share: a run, its steps and evaluations."""

from pathlib import Path
from typing import Any

import make

from dppo_cli.telemetry.console import Console
from dppo_cli.telemetry.trust_region import MaskedTokens, TokenTally
from dppo_cli.types import EvalReport, Group, RunInfo, Score, StepReport

METRICS: dict[str, Any] = {
    "step": 3,
    "reward": 0.4375,
    "accuracy": 0.25,
    "entropy": 1.2345,
    "shift_mean": 0.01234,
    "mismatch_mean": 1e-6,
    "masked_positive": 0.031,
    "masked_negative": 0.052,
    "skipped": 0.4,
    "padding": 0.07,
    "time": {"rollout": 1.25, "reward": 0.5, "update": 2.75, "sync": 0.01, "total": 4.5, "tokens_per_second": 4321.0},
}
FIGURES = [
    "reward 0.438",
    "accuracy 25.0%",
    "entropy 1.234",
    "|pi-mu| 0.0123",
    "masked A>0 3.10% A<0 5.20%",
    "4321 tokens/s",
    "rollout 1.25 reward 0.50 update 2.75",
]
"""What each step shows of METRICS."""
RUN = RunInfo(Path("runs/x"), 0, 6, "some/model", 20, 10, "cpu", "float32", "merged weights")


def console(**tallies: TokenTally) -> Console:
    """`tallies`: of tokens masked with A > 0, by their text."""
    texts = list(tallies)
    masked = MaskedTokens(text_of=lambda token: texts[token])
    masked.tallies = {(token, 1): tally for token, tally in enumerate(tallies.values())}
    return Console(masked)


def step(number: int, **changes: Any) -> StepReport:
    return StepReport({**METRICS, "step": number, **changes}, [], [])


def evaluation(accuracy: float, group_sizes: tuple[int, ...], name: str = "held_out") -> EvalReport:
    groups = [Group(make.prompt(), [make.completion()] * n, [Score(1.0)] * n) for n in group_sizes]
    return EvalReport(0, name, accuracy, 0.25, (0.125, 0.5), groups)
