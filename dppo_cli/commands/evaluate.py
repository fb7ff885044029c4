"""`dppo eval`: measure a finished run or a plain model on held-out problems."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from dppo_cli.commands.assembly import in_turns, load_engine
from dppo_cli.commands.plain import base_config
from dppo_cli.commands.problems import prompting_with
from dppo_cli.commands.replica import WORK
from dppo_cli.commands.schemas import EvalConfig
from dppo_cli.commands.trained import find_trained
from dppo_cli.config.saved import as_written
from dppo_cli.errors import ConfigError, RunError
from dppo_cli.policy.loading import load_policy, resolve_device
from dppo_cli.processes.start import crew_of
from dppo_cli.rollout.engine import in_each_process
from dppo_cli.telemetry.phases import phase
from dppo_cli.telemetry.table import percent, print_table, print_warning, with_interval
from dppo_cli.training.evaluation import EvalResult, evaluate
from dppo_cli.training.run_folder import check_free, default_run_dir
from dppo_cli.types import Status
from dppo_cli.world import World

OF_THE_RUN = ("data", "reward", "environment", "rollout", "hardware")
"""Sections that are the run's, apart from the keys that the user sets."""


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build: what `node` leaves open is the run's, or that of a plain model.

    Raises ConfigError unless there is one thing to evaluate, RunError if the run cannot be used.
    """
    if OmegaConf.select(node, "data.eval_path") is not None and OmegaConf.is_missing(node.data, "path"):
        node.data.path = None  # There is nothing to train on.
    base = base_config(node, "evaluate", OF_THE_RUN)
    if "_target_" not in (base.get("data") or {}):
        raise ConfigError("a plain model brings no problems along; add data=arithmetic, or data=file data.path=...")
    # Unresolved, so that values of the environment stay where they are.
    given: Any = OmegaConf.to_container(base)
    with open_dict(node):
        for name in (*OF_THE_RUN, "model", "adapter"):
            node[name] = given[name]
        whole = node.prompt.template is None
        for name, none in (("template", None), ("system", None), ("template_kwargs", {}), ("too_long", "refuse")):
            if node.prompt[name] is None:
                node.prompt[name] = given["prompt"][name] if whole else none
        if node.sampling.temperature is None:
            node.sampling.temperature = given["eval"]["temperature"]
        for name in ("max_new_tokens", "stop"):
            if node.sampling[name] is None:
                node.sampling[name] = given["sampling"][name]
        if node.success_reward is None:
            node.success_reward = given["eval"]["success_reward"]
    return node


def run_eval(config: EvalConfig, config_yaml: str) -> dict[str, Any]:
    """`dppo eval`: writes summary.json and samples.jsonl, prints a table, returns the summary."""
    started = time.perf_counter()
    run = None if config.run is None else find_trained(config.run, print_warning, config.checkpoint)
    out = Path(config.out) if config.out else default_run_dir(str(run.folder / "eval") if run else "evals")
    check_free(out, "out")
    result = measure(config, run.adapter if run else None, print_warning)
    summary: dict[str, Any] = {
        "model": config.model.path,
        "run": config.run,
        **result.figures(config.pass_k),
        "samples_per_prompt": config.samples_per_prompt,
        "sampling": asdict(config.sampling),
        "finished": result.finished,
        "seconds": time.perf_counter() - started,
        "out": str(out),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "config.yaml").write_text(config_yaml, encoding="utf-8")
        kept = {**summary, **_kept_paths(config, out, config_yaml)}
        (out / "summary.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        write_samples(out / "samples.jsonl", result)
    except OSError as error:
        raise RunError(f"out={out} cannot be written: {error.strerror}") from None
    rows = [("accuracy", with_interval(result.accuracy, result.interval()))]
    rows += [(f"pass@{k}", percent(value)) for k, value in summary["pass_at"].items()]
    rows += [(f"majority@{k}", percent(value)) for k, value in summary["majority_at"].items() if value is not None]
    rows += [("problems x samples", f"{len(result.groups)} x {config.samples_per_prompt}"), ("written to", str(out))]
    print_table(f"eval {config.run or config.model.path}", rows)
    return summary


def measure(config: EvalConfig, adapter: Path | None, warn: Callable[[str], None]) -> EvalResult:
    """Load what `config` names; sample, score and count. `adapter`: the folder of a run's, None for a plain model."""
    task = config.data.load(warn)
    with phase("loading the reward"):
        scorer, environment = config.reward.load(warn), config.environment.load(warn)
    device = resolve_device(config.hardware)[0].type
    # One process asks servers for everybody.
    processes = config.hardware.processes if in_each_process(config.rollout) else 1
    with crew_of(World(), processes, device, WORK, warn) as crew:
        crew.warned = warned = list[str]()

        def warn_of(text: str) -> None:
            warned.append(text)
            warn(text)

        with phase("loading the model"):
            crew.begin_all("load", config, adapter)
            policy = load_policy(
                config.model, config.hardware, warn=warn_of, adapter=config.adapter, saved_adapter=adapter
            )
            prompting = prompting_with(environment, config.prompt, policy.encoder)
            prompts = policy.encode(task.heldout, prompting)
            prompts = policy.encoder.fitting(prompts, config.sampling.max_new_tokens, config.prompt.too_long, warn)
            engine = in_turns(load_engine(config.rollout, policy, crew, warn_of), environment, policy, prompting)
            crew.ended()
        in_processes = f" in {crew.size} processes" if crew.size > 1 else ""
        with engine, phase(f"sampling {len(prompts)} problems{in_processes}"):
            engine.sync(version=0)
            return evaluate(
                engine,
                prompts,
                scorer,
                config.sampling,
                config.samples_per_prompt,
                config.success_reward,
                config.seed,
            )


def _kept_paths(config: EvalConfig, out: Path, config_yaml: str) -> dict[str, str | None]:
    """The paths of a summary as its file may hold them: what comes from the environment goes into no file."""
    run = None if config.run is None else as_written(config_yaml, "run", config.run)
    default = str(out) if run is None or run == config.run else str(Path(run) / "eval" / out.name)
    return {
        "model": as_written(config_yaml, "model.path", config.model.path),
        "run": run,
        "out": default if config.out is None else as_written(config_yaml, "out", config.out),
    }


def write_samples(path: Path, result: EvalResult) -> None:
    """One JSON line per sample: problem, prompt, answer, completion, reward (null: not judged), correct, and others.

    `messages`: of a response of several turns, all of them.
    """
    with path.open("w", encoding="utf-8") as file:
        for group in result.groups:
            for completion, score in zip(group.completions, group.scores, strict=True):
                row = {
                    "problem": group.prompt.index,
                    "prompt": group.prompt.example.prompt,
                    "answer": group.prompt.example.answer,
                    "completion": completion.text,
                    "messages": list(map(dict, completion.messages)),
                    "reward": score.value,
                    "correct": result.correct(score),
                    "finished": completion.status is Status.FINISHED,
                    "tokens": len(completion.token_ids_T),
                }
                file.write(json.dumps(row) + "\n")
