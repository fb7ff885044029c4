"""`dppo eval`: measure a finished run or a plain model on held-out problems."""

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dppo_cli.commands.schemas import EvalConfig
from dppo_cli.commands.trained import open_run
from dppo_cli.config.sections import Sampling
from dppo_cli.errors import RunError
from dppo_cli.policy.loading import load_policy
from dppo_cli.reward.exact import Exact
from dppo_cli.telemetry.table import print_table, print_warning
from dppo_cli.training.evaluation import EvalResult, evaluate
from dppo_cli.training.run_folder import check_free, default_run_dir
from dppo_cli.types import Status

PLAIN_SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=256)
"""How a plain model is sampled where `dppo eval` does not say."""


def run_eval(config: EvalConfig, config_yaml: str) -> dict[str, Any]:
    """`dppo eval`: writes summary.json and samples.jsonl, prints a table, returns the summary."""
    started = time.perf_counter()
    run = open_run(config.run, print_warning) if config.run is not None else None
    trained = run.config if run else None
    out = Path(config.out) if config.out else default_run_dir(str(run.folder / "eval") if run else "evals")
    check_free(out, "out")
    data = config.data or (trained.data if trained else None)
    reward = config.reward or (trained.reward if trained else Exact(pattern=None))
    assert data is not None
    prompting = config.prompt.over(trained.prompt if trained else None)
    sampling = config.sampling.over(trained.eval_sampling if trained else PLAIN_SAMPLING)
    success_reward = config.success_reward
    if success_reward is None:
        success_reward = trained.eval.success_reward if trained else 1.0
    task, scorer = data.load(), reward.load(print_warning)
    model = trained.model if trained else config.model
    adapter = trained.adapter if trained else None
    policy = load_policy(
        str(model.path),
        model.revision,
        config.hardware,
        warn=print_warning,
        new_adapter=adapter,
        saved_adapter=run.adapter if run else None,
    )
    prompts = policy.encode(task.heldout, prompting)
    policy.check_length(prompts, sampling.max_new_tokens)
    with config.rollout.load(policy, print_warning) as engine:
        engine.sync(version=0)
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
        "finished": result.finished,
        "seconds": time.perf_counter() - started,
        "out": str(out),
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


def write_samples(path: Path, result: EvalResult) -> None:
    """One JSON line per sample: problem, prompt, answer, completion, reward (null: not judged), correct."""
    with path.open("w", encoding="utf-8") as file:
        for group in result.groups:
            for completion, score in zip(group.completions, group.scores, strict=True):
                row = {
                    "problem": group.prompt.index,
                    "prompt": group.prompt.example.prompt,
                    "answer": group.prompt.example.answer,
                    "completion": completion.text,
                    "reward": score.value,
                    "correct": result.correct(score),
                    "finished": completion.status is Status.FINISHED,
                    "tokens": len(completion.token_ids_T),
                }
                file.write(json.dumps(row) + "\n")
