"""Evaluation: sample answers to held-out problems, score them, count."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import Any

from dppo_cli.config.checks import check_fits
from dppo_cli.config.sections import Evaluation, Sampling
from dppo_cli.reward.scorer import Scorer
from dppo_cli.rollout.collect import sample_and_score
from dppo_cli.rollout.engine import RolloutEngine
from dppo_cli.training.intervals import Interval, accuracy_interval, paired_difference
from dppo_cli.types import EvalReport, Group, Prompt, Score, Status

HELD_OUT = "held_out"
"""The name of the run's own held-out problems among the sets that it is evaluated on."""

ROUNDING = 1e-9
"""That a share may be above 1."""

Measured = dict[str, Any]
"""`EvalResult.figures()`, `rates`, and `fingerprint` of the problems: as JSON, what there is to remember."""


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
    def rates(self) -> list[float | None]:
        """For each problem, the share of right samples among those judged; None if none was."""
        problems = [[float(self.correct(s)) for s in group.scores if s.value is not None] for group in self.groups]
        return [_mean(problem) for problem in problems]

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

    def interval(self) -> Interval | None:
        """95% bootstrap interval of the accuracy; None if fewer than two problems were judged."""
        judged = self.judged
        return accuracy_interval([sum(problem) for problem in judged], [len(problem) for problem in judged])

    def standard_error(self) -> float | None:
        """Of the accuracy, from the spread over problems: samples of one problem are not independent.

        None if fewer than two problems were judged.
        """
        means = [sum(problem) / len(problem) for problem in self.judged]
        if len(means) < 2:
            return None
        mean = sum(means) / len(means)
        return math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))

    def pass_at(self, k: int) -> float | None:
        """Mean over problems of the unbiased estimate of "at least one of k samples is right".

        Over the problems with at least k judged samples; None if there are none.
        """
        return _mean([pass_at_k(len(p), sum(p), k) for p in self.judged if len(p) >= k])

    def majority_at(self, k: int) -> float | None:
        """Share of problems that the most frequent answer among k samples solves: arXiv 2203.11171.

        Over the problems with at least k samples, each cut into as many runs of k as it has; answers that tie share the
        vote. None if there are none, or if the reward does not say what a response's answer is (`Score.answer`).
        """
        if not any(score.answer is not None for group in self.groups for score in group.scores):
            return None
        votes = []
        for group in self.groups:
            blocks = [group.scores[start : start + k] for start in range(0, len(group.scores) - k + 1, k)]
            if blocks:
                votes.append(sum(map(self._majority, blocks)) / len(blocks))
        return _mean(votes)

    def _majority(self, scores: Sequence[Score]) -> float:
        """Share of right ones among the most frequent answers. A response without an answer has no vote."""
        count = Counter(score.answer for score in scores if score.answer is not None)
        most = [answer for answer, n in count.items() if n == max(count.values())]
        right = {score.answer for score in scores if self.correct(score)}
        return sum(answer in right for answer in most) / len(most) if most else 0.0

    def figures(self, ks: Sequence[int] = ()) -> dict[str, Any]:
        """What a summary holds of an evaluation. `ks`: numbers of samples for pass@k and majority@k."""
        return {
            "problems": len(self.groups),
            "samples": self.samples,
            "accuracy": self.accuracy,
            "standard_error": self.standard_error(),
            "interval": self.interval(),
            "pass_at": {str(k): self.pass_at(k) for k in ks},
            "majority_at": {str(k): self.majority_at(k) for k in ks},
        }


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), from n samples of which c are right: arXiv 2107.03374, Eq. 1."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def fingerprint(problems: Sequence[Prompt]) -> str:
    """Equal for the same prompts and answers, as text, in the same order."""
    digest = sha256()
    for example in (problem.example for problem in problems):
        text = json.dumps([example.prompt, [dict(m) for m in example.messages], example.answer], sort_keys=True)
        digest.update(f"{text}\n".encode())
    return digest.hexdigest()[:16]


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
    found = sample_and_score(engine, scorer, prompts, samples_per_prompt, sampling, 0, seed)
    rows = zip(prompts, found.completions, found.scores, strict=True)
    return EvalResult([Group(*row) for row in rows], success_reward)


@dataclass(frozen=True)
class Evaluator:
    """Measures the policy of a run. `sets`: problems by the name of their set; the run's own are `HELD_OUT`.

    `tell` hears of each evaluation.
    """

    engine: RolloutEngine
    scorer: Scorer
    sets: Mapping[str, Sequence[Prompt]]
    sampling: Sampling
    plan: Evaluation
    seed: int
    tell: Callable[[EvalReport], None]

    def __call__(self, step: int, name: str = HELD_OUT) -> EvalResult:
        """Evaluate on one set after a step."""
        plan = self.plan
        result = evaluate(
            self.engine,
            self.sets[name],
            self.scorer,
            self.sampling,
            plan.samples_per_prompt,
            plan.success_reward,
            self.seed,
        )
        self.tell(EvalReport(step, name, result.accuracy, result.standard_error(), result.interval(), result.groups))
        return result

    def all(self, step: int) -> dict[str, Measured]:
        """Evaluate on every set after a step."""
        n = self.plan.samples_per_prompt
        ks = [k for k in (2**i for i in range(n.bit_length())) if k <= n]
        found = {name: self(step, name) for name in self.sets}
        return {
            name: {**result.figures(ks), "rates": result.rates, "fingerprint": fingerprint(self.sets[name])}
            for name, result in found.items()
        }


def check_measured(found: Any) -> None:
    """Raise ValueError, or what a wrong type leads to, unless `found` is what `Evaluator.all` gives, as JSON."""
    for measured in found.values():
        rates, interval = measured["rates"], measured["interval"]
        of_k = [*measured["pass_at"].items(), *measured["majority_at"].items()]
        shares = [measured["accuracy"], measured["standard_error"], *(interval or ()), *(v for _, v in of_k), *rates]
        if not (
            all(share is None or (type(share) in (int, float) and 0 <= share <= 1 + ROUNDING) for share in shares)
            and isinstance(rates, list)
            and (interval is None or (isinstance(interval, list) and len(interval) == 2))
            and all(k.isdecimal() for k, _ in of_k)
            and (measured["problems"], type(measured["samples"])) == (len(rates), int)
            and isinstance(measured.get("fingerprint"), str | None)
        ):
            raise ValueError(f"no evaluation gives {str(measured)[:200]}")


def compared(before: Mapping[str, Measured] | None, after: Mapping[str, Measured] | None) -> dict[str, Any]:
    """What a summary holds of the evaluations before and after training. None: there was none.

    `eval_*` are of the run's own held-out problems; `evaluations` holds the figures of every set, and the paired
    difference between after and before.
    """
    before, after = before or {}, after or {}
    first, last = before.get(HELD_OUT, {}), after.get(HELD_OUT, {})
    sets: dict[str, Any] = {}
    for name, measured in before.items():
        difference = paired_difference(measured["rates"], after[name]["rates"]) if name in after else None
        sets[name] = {
            "before": _shown(measured),
            "after": _shown(after[name]) if name in after else None,
            "difference": None if difference is None else asdict(difference),
        }
    return {
        "eval_before": first.get("accuracy"),
        "eval_before_error": first.get("standard_error"),
        "eval_after": last.get("accuracy"),
        "eval_after_error": last.get("standard_error"),
        "eval_problems": first.get("problems"),
        "evaluations": sets,
    }


def _shown(measured: Measured) -> dict[str, Any]:
    return {key: value for key, value in measured.items() if key not in ("rates", "fingerprint")}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
