"""`dppo train`: the whole method on one page.

prompts -> completions -> scores -> groups -> updates, `steps` times, between two evaluations.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.errors import ConfigError
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.collect import Collector, InStepCollector
from dppo_cli.rollout.engine import RolloutEngine
from dppo_cli.telemetry.console import Console
from dppo_cli.telemetry.listeners import Listeners
from dppo_cli.telemetry.trust_region import MaskedTokens
from dppo_cli.telemetry.watch import Watch
from dppo_cli.training.batches import PromptOrder, mini_batches
from dppo_cli.training.evaluation import evaluate
from dppo_cli.training.learner import Learner
from dppo_cli.training.metrics import PhaseTimer, peak_memory_gib, rollout_metrics, update_metrics
from dppo_cli.training.run_folder import RunFolder, check_free, default_run_dir
from dppo_cli.training.state import RunState
from dppo_cli.types import EvalReport, RunInfo, StepReport
from dppo_cli.world import World


def train(
    state: RunState,
    config: TrainConfig,
    collector: Collector,
    engine: RolloutEngine,
    evaluate_now: Callable[[], float],
    folder: RunFolder,
    listeners: Listeners,
) -> None:
    """Take `state` from the step it is at to `config.steps`; `evaluate_now` gives the held-out accuracy."""
    learner = state.learner
    while state.step < config.steps:
        step, timer = state.step + 1, PhaseTimer()
        collected = collector.collect(state.prompts.take(config.batch.prompts_per_step), step)
        timer.seconds.update(collected.seconds)
        groups = collected.groups
        with timer.phase("update"):
            if config.anchor == "recompute":
                groups = learner.anchored(groups)
            updates = [learner.update(part) for part in mini_batches(groups, config.batch, config.seed, step)]
        with timer.phase("sync"):
            engine.sync(version=step)
        state.step = step
        metrics = {"step": step, **rollout_metrics(groups, config.eval.success_reward), **update_metrics(updates)}
        if config.eval.every and step % config.eval.every == 0 and step < config.steps:
            with timer.phase("eval"):
                metrics["eval_accuracy"] = evaluate_now()
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            folder.save_adapter(f"checkpoints/step-{step}")
        metrics["time"] = timer.seconds_and_rates(groups)
        folder.log(metrics)
        listeners.stepped(StepReport(metrics, groups, [update.stats for update in updates]))


def run_train(config: TrainConfig, config_yaml: str) -> dict[str, Any]:
    """Load, evaluate, train, evaluate, save; returns what summary.json holds.

    On Ctrl-C the adapter is saved as it is, and KeyboardInterrupt goes on with a text that says where.
    """
    started = time.perf_counter()
    world = World.current()
    if world.size > 1:
        raise ConfigError(f"{world.size} processes were started, and training runs in one; start dppo by itself")
    run_dir = Path(config.run_dir) if config.run_dir else default_run_dir("runs")
    check_free(run_dir, "run_dir")
    early = config.unusual()
    task, scorer = config.data.load(), config.reward.load()
    policy = load_policy(
        config.model.path,
        config.model.revision,
        config.hardware,
        warn=early.append,
        new_adapter=config.adapter,
        seed=config.seed,
    )
    train_prompts = policy.encode(task.train, config.prompt)
    heldout_prompts = policy.encode(task.heldout, config.prompt)
    policy.check_length([*train_prompts, *heldout_prompts], config.sampling.max_new_tokens)
    engine = config.rollout.load(policy, early.append)
    collector = InStepCollector(
        engine,
        scorer,
        config.advantage,
        config.batch.samples_per_prompt,
        config.sampling,
        config.approx.num_logprobs,
        config.seed,
    )

    def warn(text: str) -> None:
        state.warnings.append(text)
        listeners.warned(text)

    def evaluate_now() -> float:
        plan = config.eval
        result = evaluate(
            engine,
            heldout_prompts,
            scorer,
            config.eval_sampling,
            plan.samples_per_prompt,
            plan.success_reward,
            config.seed,
        )
        listeners.evaluated(EvalReport(state.step, result.accuracy, result.standard_error(), result.groups))
        return result.accuracy

    masked = MaskedTokens(text_of=lambda token: str(policy.tokenizer.decode([token])))
    watch = Watch(config.objective.masks, warn)
    listeners = Listeners([masked, watch, Console(masked)] if world.is_main else [], warn)
    state = RunState(
        make_learner(policy, config, world),
        PromptOrder(train_prompts, config.seed),
        tallies={"masked_tokens": masked, "watch": watch},
    )
    summary = after = None
    try:
        with (
            RunFolder(
                run_dir, config_yaml, policy.save_adapter, policy.adapter_bytes, 1 + config.checkpoints
            ) as folder,
            engine,
        ):
            listeners.started(run_info(run_dir, config, policy))
            for text in early:
                warn(text)
            engine.sync(version=0)
            try:
                state.eval_before = evaluate_now()
                train(state, config, collector, engine, evaluate_now, folder, listeners)
                after = evaluate_now()
            except KeyboardInterrupt:
                if state.step == 0:
                    raise KeyboardInterrupt("before the first step was finished; nothing is saved") from None
            adapter = folder.save_adapter("adapter")
            result = {
                "eval_before": state.eval_before,
                "eval_after": after,
                "steps": state.step,
                "interrupted": after is None,
                "seconds": time.perf_counter() - started,
                "peak_memory_gib": peak_memory_gib(policy.device),
                "trained_parameters": sum(p.numel() for p in policy.parameters),
                "warnings": state.warnings,
                "run_dir": str(run_dir),
                "adapter": str(adapter),
            }
            folder.write("summary.json", result)
            summary = result
    finally:
        listeners.finished(summary)
    if after is None:
        raise KeyboardInterrupt(f"after step {state.step} of {config.steps}; the adapter as it is then is in {adapter}")
    return summary


def make_learner(policy: Policy, config: TrainConfig, world: World | None = None) -> Learner:
    return Learner(
        policy,
        config.loss,
        config.aggregation,
        config.optim,
        config.hardware,
        temperature=config.sampling.temperature,
        max_new_tokens=config.sampling.max_new_tokens,
        total_updates=config.steps * config.batch.updates_per_step,
        world=world,
    )


def run_info(run_dir: Path, config: TrainConfig, policy: Policy) -> RunInfo:
    return RunInfo(
        run_dir=run_dir,
        steps=config.steps,
        model=config.model.path,
        parameters=sum(p.numel() for p in policy.model.parameters()),
        trained_parameters=sum(p.numel() for p in policy.parameters),
        device=str(policy.device),
        dtype=str(policy.dtype).removeprefix("torch."),
    )
