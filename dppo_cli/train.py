"""`dppo train`: the whole method on one page.

prompts -> completions -> rewards -> advantages -> updates, `steps` times, between two evaluations.
"""

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from dppo_cli.config import TrainConfig
from dppo_cli.evaluate import Evaluation, evaluate
from dppo_cli.learner import Learner, UpdateResult
from dppo_cli.policy.loading import load_policy
from dppo_cli.run_folder import RunFolder, check_free, default_run_dir
from dppo_cli.telemetry.console import Console
from dppo_cli.telemetry.metrics import PhaseTimer, peak_memory_gib, rollout_metrics, update_metrics
from dppo_cli.telemetry.trust_region import MaskedTokens, TokenStats
from dppo_cli.types import Completion, Prompt, Sample


def run_train(config: TrainConfig, config_yaml: str) -> dict[str, Any]:
    """Train one policy; returns what summary.json holds. On Ctrl-C it saves the adapter as it is and says so."""
    started = time.perf_counter()
    run_dir = Path(config.run_dir) if config.run_dir else default_run_dir("runs")
    check_free(run_dir, "run_dir")
    task, scorer = config.data.load(), config.reward.load()
    policy = load_policy(
        config.model.path, config.model.revision, config.hardware, new_adapter=config.adapter, seed=config.seed
    )
    train_prompts = policy.encode(task.train, config.prompt)
    heldout_prompts = policy.encode(task.heldout, config.prompt)
    policy.check_length([*train_prompts, *heldout_prompts], config.sampling.max_new_tokens)
    engine, learner = config.rollout.load(policy), Learner(policy, config)
    batches = prompt_batches(train_prompts, config.batch.prompts_per_step, config.seed)
    checkpoints = config.steps // config.checkpoint_every if config.checkpoint_every else 0

    def evaluate_now() -> Evaluation:
        sampling = config.eval_sampling
        plan = config.eval
        return evaluate(
            engine, heldout_prompts, scorer, sampling, plan.samples_per_prompt, plan.success_reward, config.seed
        )

    with RunFolder(run_dir, config_yaml, policy, checkpoints) as folder, Console(config, policy, run_dir) as console:
        masked_tokens = MaskedTokens()
        done, after = 0, None
        try:
            before = evaluate_now()
            console.evaluated(0, before)
            for step in range(1, config.steps + 1):
                timer = PhaseTimer()
                with timer.phase("rollout"):
                    completions = engine.generate(
                        next(batches),
                        config.batch.samples_per_prompt,
                        config.sampling,
                        config.approx.num_logprobs,
                        seed=derive_seed(config.seed, step),
                    )
                with timer.phase("reward"):
                    samples = score(completions, scorer(completions), config)
                with timer.phase("update"):
                    if config.anchor == "recompute":
                        samples = learner.anchored(samples)
                    updates = [learner.update(part) for part in mini_batches(samples, config, step)]
                with timer.phase("sync"):
                    engine.sync(version=step)
                done = step
                collect(masked_tokens, updates)
                metrics = {"step": step, **rollout_metrics(samples, config), **update_metrics(updates)}
                if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                    with timer.phase("eval"):
                        metrics["eval_accuracy"] = console.evaluated(step, evaluate_now()).accuracy
                if config.checkpoint_every and step % config.checkpoint_every == 0:
                    folder.save_adapter(f"checkpoints/step-{step}")
                metrics["time"] = timer.seconds_and_rates(completions, updates)
                folder.log(metrics)
                console.stepped(metrics)
            after = evaluate_now()
            console.evaluated(done, after)
        except KeyboardInterrupt:
            console.interrupted(done)
            if done == 0:
                raise
        adapter = folder.save_adapter("adapter")
        summary = {
            "eval_before": before.accuracy,
            "eval_after": after.accuracy if after else None,
            "steps": done,
            "interrupted": after is None,
            "seconds": time.perf_counter() - started,
            "peak_memory_gib": peak_memory_gib(policy.device),
            "trained_parameters": sum(p.numel() for p in policy.parameters),
            "warnings": console.warnings,
            "run_dir": str(run_dir),
            "adapter": str(adapter),
        }
        table = masked_tokens.rows(20, lambda token: policy.tokenizer.decode([token]))
        folder.write("masked_tokens.json", table)
        folder.write("summary.json", summary)
        console.finished(summary, table)
    if after is None:
        raise KeyboardInterrupt
    return summary


def score(completions: Sequence[Completion], rewards: Sequence[float], config: TrainConfig) -> list[Sample]:
    """Samples with the advantage of their reward over the other samples of the same prompt."""
    reward_PG = torch.tensor(rewards, dtype=torch.float32).view(-1, config.batch.samples_per_prompt)
    advantages = config.advantage(reward_PG).flatten().tolist()
    return [
        Sample(completion, reward, advantage, anchor=completion.mu)
        for completion, reward, advantage in zip(completions, rewards, advantages, strict=True)
    ]


def mini_batches(samples: Sequence[Sample], config: TrainConfig, step: int) -> Iterator[list[Sample]]:
    """The samples of `prompts_per_update` whole prompts at a time; every epoch after the first in a new order."""
    group = config.batch.samples_per_prompt
    groups = [samples[i : i + group] for i in range(0, len(samples), group)]
    shuffle = random.Random(derive_seed(config.seed, -step))
    for epoch in range(config.batch.epochs):
        if epoch:
            shuffle.shuffle(groups)
        for start in range(0, len(groups), config.batch.prompts_per_update):
            yield [s for g in groups[start : start + config.batch.prompts_per_update] for s in g]


def prompt_batches(prompts: Sequence[Prompt], size: int, seed: int) -> Iterator[list[Prompt]]:
    """Endless batches; every prompt comes once before any comes again, in an order drawn anew each time."""
    shuffle, queue = random.Random(seed), list[Prompt]()
    while True:
        while len(queue) < size:
            queue += shuffle.sample(prompts, len(prompts))
        yield queue[:size]
        queue = queue[size:]


def derive_seed(seed: int, step: int) -> int:
    """A seed of its own for every step of every run seed."""
    return random.Random(f"{seed}:{step}").getrandbits(63)


def collect(masked_tokens: MaskedTokens, updates: Sequence[UpdateResult]) -> None:
    parts = [part for update in updates for part in update.stats]
    if parts:
        masked_tokens.add(TokenStats.cat(parts))
