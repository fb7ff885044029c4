"""`dppo train`: the whole method on one page.

prompts -> completions -> scores -> groups -> updates, `steps` times, between two evaluations.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from dppo_cli.commands.assembly import (
    in_turns,
    load_engine,
    make_collector,
    make_learner,
    make_order,
    run_info,
    shared_learner,
    with_processes,
)
from dppo_cli.commands.problems import encoded_problems, prompting_with
from dppo_cli.commands.replica import WORK, work
from dppo_cli.commands.resume import Earlier, check_problems, find_earlier, method_hash
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.saved import as_written
from dppo_cli.policy.adapter import WEIGHTS
from dppo_cli.policy.loading import load_policy, resolve_device
from dppo_cli.processes.crew import Crew
from dppo_cli.processes.start import crew_of, launched_worker
from dppo_cli.rollout.collect import Collector
from dppo_cli.rollout.engine import RolloutEngine, steps_ahead
from dppo_cli.telemetry.console import make_console
from dppo_cli.telemetry.listeners import Listeners
from dppo_cli.telemetry.table import print_warning
from dppo_cli.telemetry.trackers import Tracker, check_installed, chosen
from dppo_cli.telemetry.trust_region import MaskedTokens
from dppo_cli.telemetry.watch import Watch
from dppo_cli.training.batches import mini_batches
from dppo_cli.training.card import card
from dppo_cli.training.checkpoint import prune, read_checkpoint, sha256_of, write_checkpoint
from dppo_cli.training.evaluation import Evaluator, Measured, compared, fingerprint
from dppo_cli.training.memory_use import memory_metrics, peak_memory_gib
from dppo_cli.training.metrics import PhaseTimer, rollout_metrics, update_metrics
from dppo_cli.training.nonfinite import update
from dppo_cli.training.rescue import rescue
from dppo_cli.training.run_folder import BEFORE, RunFolder, default_run_dir
from dppo_cli.training.samples import StepSamples
from dppo_cli.training.state import RunState
from dppo_cli.training.stopping import Stopping
from dppo_cli.training.system import system_facts
from dppo_cli.types import StepReport
from dppo_cli.world import World


def train(
    state: RunState,
    config: TrainConfig,
    collector: Collector,
    engine: RolloutEngine,
    evaluator: Evaluator,
    save: Callable[[], object],
    elapsed: Callable[[], float],
    folder: RunFolder,
    samples: StepSamples,
    listeners: Listeners,
    stopping: Stopping,
) -> None:
    """Take `state` from the step it is at to `config.steps`.

    `save` writes a checkpoint, `elapsed` gives the seconds of the whole run. Raises Stopped when a signal asks for it.
    """
    learner, every = state.learner, config.checkpoint.every
    while state.step < config.steps:
        stopping.check()
        if (reason := config.stop.reason(elapsed(), state.best and state.best[1])) is not None:
            listeners.warned(f"after step {state.step}: {reason}")
            break
        step, timer = state.step + 1, PhaseTimer()
        state.begin_step()
        collected = collector.collect(state.prompts.take, step)
        timer.seconds.update(collected.seconds)
        groups = samples.chosen(step, collected.groups)
        state.prompts.learn(collected.sampled, lambda value: value >= config.eval.success_reward)
        with timer.phase("update"):
            if config.anchor == "recompute":
                groups = learner.anchored(groups)
            parts = mini_batches(groups, config.batch, config.seed, step)
            updates = [update(learner, part, step, folder, config.optim.on_nonfinite) for part in parts]
        with timer.phase("sync"):
            engine.sync(version=step)
        of_rollout = rollout_metrics(collected, step, config.eval.success_reward)
        metrics = {"step": step, **of_rollout, **update_metrics(updates)}
        if config.eval.every and step % config.eval.every == 0 and step < config.steps:
            with timer.phase("eval"):
                metrics["eval_accuracy"] = evaluator(step).accuracy
        metrics |= {"time": timer.seconds_and_rates(collected), "memory": memory_metrics(learner.policy.device)}
        is_best = state.is_best(metrics.get("eval_accuracy"))
        # A step is finished when its line is written and everybody has heard of it, all or nothing.
        with stopping.shielded():
            folder.log(metrics)
            listeners.stepped(StepReport(metrics, groups, [update.stats for update in updates]))
            samples.keep(folder, step, groups, updates)
            state.finish_step(metrics.get("eval_accuracy"))
        if is_best or stopping.wants_checkpoint or (every and step % every == 0):
            stopping.wants_checkpoint = False
            save()


def run_train(config: TrainConfig, config_yaml: str) -> dict[str, Any]:
    """Load, evaluate, train, evaluate, save; returns what summary.json holds.

    Whatever ends a run early, the state after its last finished step is saved, and the error says where.
    """
    started = time.perf_counter()
    device = resolve_device(config.hardware)[0].type
    with World.launched(device, print_warning) as world:
        if not world.is_main:
            if (line := launched_worker(world)) is not None:
                work(line, world)
            return {}
        if world.size > 1:
            config.check_processes(world.size)
            config_yaml = with_processes(config_yaml, world.size)
        run_dir = Path(config.run_dir) if config.run_dir else default_run_dir("runs")
        early = config.unusual()
        check_installed(config.tracker)
        earlier = find_earlier(run_dir, config, config_yaml, early.append)
        if earlier.summary is not None:
            return earlier.summary
        with crew_of(world, config.hardware.processes, device, WORK, early.append) as crew:
            return _run(config, config_yaml, run_dir, earlier, early, crew, started)


def _run(
    config: TrainConfig,
    config_yaml: str,
    run_dir: Path,
    earlier: Earlier,
    early: list[str],
    crew: Crew,
    started: float,
) -> dict[str, Any]:
    """The run, from what may be there of it already. `early`: warnings from before there is anybody to tell."""
    masked = MaskedTokens(text_of=lambda token: decode([token]))
    console = make_console(config.console, masked, config.eval.every)
    with console.phase("loading the reward"):
        scorer = config.reward.load(lambda text: warn(text))
        environment = config.environment.load(lambda text: warn(text))
    if earlier.checkpoint is not None:
        # It has the weights; the folder that they started from may be gone.
        config = replace(config, adapter=replace(config.adapter, path=None))
    with console.phase("loading the model"):
        crew.warned = early
        crew.begin_all("load", config)
        policy = load_policy(config.model, config.hardware, warn=early.append, adapter=config.adapter, seed=config.seed)
    prompting = prompting_with(environment, config.prompt, policy.encoder)
    train_prompts, sets = encoded_problems(config, prompting, policy.encoder, early.append)
    engine = load_engine(config.rollout, policy, crew, lambda text: crew.warn(text))
    engine = in_turns(engine, environment, policy, prompting)
    learner = shared_learner(make_learner(policy, config, lambda text: warn(text), crew.world), crew)
    crew.ended()  # loading
    if crew.size > config.batch.prompts_per_update:
        early.append(
            f"{crew.size} processes share the batch.prompts_per_update={config.batch.prompts_per_update} groups of an "
            "update: some have nothing to do"
        )
    order = make_order(config, train_prompts)
    collector = make_collector(config, engine, scorer, order)
    evaluator = Evaluator(
        engine,
        scorer,
        sets,
        config.eval_sampling,
        config.eval,
        config.seed,
        tell=lambda report: listeners.evaluated(report),
    )
    described: Any = OmegaConf.to_container(OmegaConf.create(config_yaml))

    def warn(text: str) -> None:
        state.warnings.append(text)
        folder.warned(text)
        listeners.warned(text)

    def elapsed() -> float:
        return state.seconds + time.perf_counter() - started

    def write_adapter(path: Path, results: Mapping[str, Any] | None = None) -> None:
        """The adapter, and what there is to say of it."""
        policy.save_adapter(path)
        so_far = {**compared(state.before, None), "steps": state.step}
        (path / "README.md").write_text(card(described, results or so_far, "adapter"), encoding="utf-8")

    def save() -> Path:
        snapshot = state.snapshot()
        snapshot.plain["seconds"] = elapsed()
        path = write_checkpoint(folder.path, snapshot, write_adapter, method_hash(config_yaml))
        prune(folder.path, state.step, config.checkpoint.keep, also=[state.best[0]] if state.best else [])
        return path

    def finish(after: dict[str, Measured] | None) -> dict[str, Any]:
        """Save the state as it is, and say what the run was."""
        save()
        results = {
            **compared(state.before, after),
            "steps": state.step,
            "interrupted": after is None,
            "seconds": elapsed(),
            "peak_memory_gib": peak_memory_gib(policy.device),
            "system": {**system_facts(policy.device, policy.dtype), "sampled from": engine.samples_with},
            "trained_parameters": sum(p.numel() for p in policy.parameters),
            "warnings": state.warnings,
            "resumes": folder.resumes(),
            "run_dir": str(folder.path),
        }
        adapter = folder.save_adapter(partial(write_adapter, results=results))
        summary = {**results, "adapter": str(adapter), "adapter_sha256": sha256_of(adapter / WEIGHTS)}
        # The summary comes last: a run that has one is not taken up again.
        masked.finished(summary)
        kept_dir = Path(as_written(config_yaml, "run_dir", str(folder.path)))
        kept = {"run_dir": str(kept_dir), "adapter": str(kept_dir / adapter.relative_to(folder.path))}
        folder.write("summary.json", {**summary, **kept})
        return summary

    def decode(token_ids: Sequence[int]) -> str:
        return str(policy.tokenizer.decode(list(token_ids)))

    system = config.prompt.system or ""
    samples = StepSamples(
        *(config.samples, config.steps, decode, warn),
        # Values of the environment go into no file.
        whole_prompts=as_written(config_yaml, "prompt.system", system) == system,
    )
    moves = config.batch.updates_per_step > 1 or steps_ahead(config.rollout) > 0
    watch = Watch(config.objective.masks and moves, warn, answered=environment is not None)
    trackers = [Tracker(name, config_yaml) for name in chosen(config.tracker)]
    listeners = Listeners([masked, watch, *trackers, console], warn)
    state = RunState(
        learner,
        order,
        tallies={"masked_tokens": masked, "watch": watch, "samples": samples},
        fingerprint=fingerprint(train_prompts),
        most_prompts=config.batch.prompts_per_step * (1 + config.replacement_rounds),
    )
    folder = RunFolder(
        run_dir,
        config_yaml,
        # Adapter, its copy in the state and two moments, for each checkpoint and one that is being written.
        4 * policy.adapter_bytes * (config.checkpoint.keep + 3),
        named=config.run_dir is not None,
        goes_on=earlier.goes_on,
    )
    if earlier.checkpoint is not None:
        saved = read_checkpoint(earlier.checkpoint)
        state.load(saved)
        check_problems(earlier.checkpoint, saved, train_prompts, sets, early.append)
    if earlier.goes_on:
        folder.check_goes_on(state.step)
    stopping = Stopping(config.checkpoint.grace, listeners.warned)
    summary = None
    try:
        with folder, engine, stopping:
            if earlier.goes_on:
                folder.cut(state.step)
                folder.warned_before(state.warnings)
            if earlier.checkpoint is not None:
                folder.resumed(state.step, earlier.changes)
            listeners.started(run_info(folder.path, config, policy, engine, state.step))
            for text in early:
                # A run that goes on has warned of it before.
                (listeners.warned if text in state.warnings else warn)(text)
            crew.warn, crew.warned = warn, state.warnings
            # The workers begin with the state of this process.
            crew.begin_all("load_state", *learner.state())
            crew.ended()
            engine.sync(version=state.step)
            try:
                if state.before is None:
                    with console.phase("evaluating before training"):
                        state.before = evaluator.all(0)
                        folder.write(BEFORE, state.before)
                train(state, config, collector, engine, evaluator, save, elapsed, folder, samples, listeners, stopping)
                with console.phase("evaluating after training"):
                    after = evaluator.all(state.step)
                summary = finish(after)
            except BaseException as error:
                # Raised within, because the end of a shield may raise what is told here already: that the run stops.
                with stopping.shielded():
                    told, summary = rescue(error, state, folder, finish)
                    try:
                        raise told from (None if told is error else error)
                    finally:
                        del told  # Its trace holds this frame: the model would stay in memory for a sweep's next job.
    finally:
        listeners.finished(summary)
    return summary
