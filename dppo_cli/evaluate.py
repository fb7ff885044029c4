"""Evaluation: sample answers to held-out problems, score them, count. `dppo eval`, and before and after training."""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dppo_cli.config import EvalConfig, TrainConfig, build
from dppo_cli.errors import RunError
from dppo_cli.policy.loading import load_policy
from dppo_cli.reward.exact import Exact
from dppo_cli.reward.scorer import Scorer
from dppo_cli.rollout.engine import RolloutEngine
from dppo_cli.run_folder import check_free, default_run_dir, open_run
from dppo_cli.sections import Sampling
from dppo_cli.telemetry.table import print_table
from dppo_cli.types import Completion, Prompt

PLAIN_SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=256)
"""How a plain model is sampled where `dppo eval` does not say."""


@dataclass(frozen=True)
class Evaluation:
    """`rewards[i]` is the reward of `completions[i]`, NaN where it was not judged; samples of a prompt are adjacent."""

    completions: list[Completion]
    rewards: list[float]
    samples_per_prompt: int
    success_reward: float

    @property
    def correct(self) -> list[bool]:
        return [r >= self.success_reward for r in self.rewards]

    @property
    def judged(self) -> list[list[bool]]:
        """For each problem, which of its judged samples are right; problems without a judged sample are left out."""
        n = self.samples_per_prompt
        pairs = list(zip(self.correct, self.rewards, strict=True))
        problems = [[c for c, r in pairs[i : i + n] if not math.isnan(r)] for i in range(0, len(pairs), n)]
        return [problem for problem in problems if problem]

    @property
    def accuracy(self) -> float:
        """Share of right samples among those judged, in [0, 1]."""
        return _mean([float(c) for problem in self.judged for c in problem])

    def pass_at(self, k: int) -> float:
        """Mean over problems of the unbiased estimate of "at least one of k samples is right".

        Over the problems with at least k judged samples; NaN if there are none.
        """
        return _mean([pass_at_k(len(p), sum(p), k) for p in self.judged if len(p) >= k])

    def standard_error(self) -> float:
        """Of the accuracy, from the spread over problems: samples of one problem are not independent."""
        means = [sum(problem) / len(problem) for problem in self.judged]
        if len(means) < 2:
            return math.nan
        mean = _mean(means)
        return math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1) / len(means))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


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
) -> Evaluation:
    """Sample, score and count. The engine samples from whatever version it was last synced to."""
    completions = engine.generate(prompts, samples_per_prompt, sampling, 0, seed)
    return Evaluation(completions, scorer(completions), samples_per_prompt, success_reward)


def run_eval(config: EvalConfig, config_yaml: str) -> dict[str, Any]:
    """`dppo eval`: writes summary.json and samples.jsonl, prints a table, returns the summary."""
    started = time.perf_counter()
    trained = _trained(config.run)
    out = Path(config.out) if config.out else _default_out(config.run)
    check_free(out, "out")
    data = config.data or (trained.data if trained else None)
    reward = config.reward or (trained.reward if trained else Exact(pattern=None))
    assert data is not None
    prompting = config.prompt.over(trained.prompt if trained else None)
    sampling = config.sampling.over(trained.eval_sampling if trained else PLAIN_SAMPLING)
    success_reward = config.success_reward
    if success_reward is None:
        success_reward = trained.eval.success_reward if trained else 1.0
    task, scorer = data.load(), reward.load()
    model = trained.model if trained else config.model
    adapter = trained.adapter if trained else None
    policy = load_policy(
        str(model.path),
        model.revision,
        config.hardware,
        new_adapter=adapter,
        saved_adapter=Path(config.run) / "adapter" if config.run else None,
    )
    engine = config.rollout.load(policy)
    prompts = policy.encode(task.heldout, prompting)
    policy.check_length(prompts, sampling.max_new_tokens)
    result = evaluate(engine, prompts, scorer, sampling, config.samples_per_prompt, success_reward, config.seed)
    pass_at = {str(k): result.pass_at(k) for k in config.pass_k}
    summary: dict[str, Any] = {
        "model": str(model.path),
        "run": config.run,
        "problems": len(prompts),
        "samples_per_prompt": config.samples_per_prompt,
        "accuracy": result.accuracy,
        "standard_error": result.standard_error(),
        "pass_at": pass_at,
        "sampling": asdict(sampling),
        "finished": sum(c.finished for c in result.completions) / len(result.completions),
        "seconds": time.perf_counter() - started,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(config_yaml, encoding="utf-8")
        (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        write_samples(out / "samples.jsonl", result)
    except OSError as error:
        raise RunError(f"out={out} cannot be written: {error.strerror}") from None
    rows = [("accuracy", f"{result.accuracy:.1%} ± {summary['standard_error']:.1%} (standard error)")]
    rows += [(f"pass@{k}", f"{value:.1%}") for k, value in pass_at.items()]
    rows += [("problems x samples", f"{len(prompts)} x {config.samples_per_prompt}"), ("written to", str(out))]
    print_table(f"eval {config.run or config.model.path}", rows)
    return summary


def write_samples(path: Path, result: Evaluation) -> None:
    """One JSON line per sample: problem, prompt, answer, completion, reward (null: not judged), correct."""
    with path.open("w", encoding="utf-8") as file:
        for completion, reward, correct in zip(result.completions, result.rewards, result.correct, strict=True):
            row = {
                "problem": completion.prompt.index,
                "prompt": completion.prompt.text,
                "answer": completion.prompt.answer,
                "completion": completion.text,
                "reward": None if math.isnan(reward) else reward,
                "correct": correct,
                "finished": completion.finished,
                "tokens": len(completion.token_ids_T),
            }
            file.write(json.dumps(row) + "\n")


def _trained(run: str | None) -> TrainConfig | None:
    return read_run_config(open_run(run)) if run is not None else None


def read_run_config(run: Path) -> TrainConfig:
    """The config a run was trained with."""
    node = OmegaConf.load(run / "config.yaml")
    return build(TrainConfig, node)  # type: ignore[arg-type]


def _default_out(run: str | None) -> Path:
    return default_run_dir(str(Path(run) / "eval") if run else "evals")
