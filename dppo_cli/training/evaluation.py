"""Evaluation: sample answers to held-out problems, score them, count."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dppo_cli.config.checks import check_fits
from dppo_cli.config.sections import Sampling
from dppo_cli.reward.scorer import Scorer
from dppo_cli.rollout.engine import RolloutEngine
from dppo_cli.types import Group, Prompt, Score, Status


@dataclass(frozen=True)
class EvalResult:
    """`groups`: a problem each. A sample is right when its score is at least `success_reward`."""

    groups: Sequence[Group]
    success_reward: float

    def correct(self, score: Score) -> bool:
        return score.value is not None and score.value >= self.success_reward

    @property
    def judged(self) -> list[list[bool]]:
        """For each problem, which of its judged samples are right; problems without a judged sample are left out."""
        problems = [[self.correct(s) for s in group.scores if s.value is not None] for group in self.groups]
        return [problem for problem in problems if problem]

    @property
    def samples(self) -> int:
        return sum(len(group.completions) for group in self.groups)

    @property
    def finished(self) -> float | None:
        """Share of samples that ended by themselves; None if there are none."""
        return _mean([float(c.status is Status.FINISHED) for group in self.groups for c in group.completions])

    @property
    def accuracy(self) -> float | None:
        """Share of right samples among those judged, in [0, 1]; None if there are none."""
        return _mean([float(c) for problem in self.judged for c in problem])

    def pass_at(self, k: int) -> float | None:
        """Mean over problems of the unbiased estimate of "at least one of k samples is right".

        Over the problems with at least k judged samples; None if there are none.
        """
        return _mean([pass_at_k(len(p), sum(p), k) for p in self.judged if len(p) >= k])

    def standard_error(self) -> float | None:
        """Of the accuracy, from the spread over problems: samples of one problem are not independent.

        None if fewer than two problems were judged.
        """
        means = [sum(problem) / len(problem) for problem in self.judged]
        if len(means) < 2:
            return None
        mean = sum(means) / len(means)
        return math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), from n samples of which c are right: arXiv 2107.03374, Eq. 1."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    scorer: Scorer,
    sampling: Sampling,
    samples_per_prompt: int,
    success_reward: float,
    seed: int,
) -> EvalResult:
    """Sample, score and count. The engine samples from whatever version it was last synced to."""
    check_fits("samples_per_prompt", samples_per_prompt, len(prompts) * samples_per_prompt)
    completions = engine.generate(prompts, samples_per_prompt, sampling, 0, seed)
    scores = scorer(prompts, completions)
    return EvalResult([Group(*row) for row in zip(prompts, completions, scores, strict=True)], success_reward)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
