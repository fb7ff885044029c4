"""`dppo plan`: what a run needs, in memory and time, before it starts and without loading a weight."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import psutil
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.markup import escape
from rich.table import Table

from dppo_cli.commands import resume, train
from dppo_cli.commands.planning.cards import card_of
from dppo_cli.commands.planning.machine import Machine, find_machine
from dppo_cli.commands.planning.share import share_of
from dppo_cli.commands.schemas import PlanConfig
from dppo_cli.commands.trained import key_of
from dppo_cli.environment.environment import turns_of
from dppo_cli.errors import ConfigError
from dppo_cli.rollout.engine import in_each_process
from dppo_cli.telemetry.table import RichConsole, print_table

if TYPE_CHECKING:
    from dppo_cli.commands.planning.estimate import Estimate

GIB = 2**30

WORTH = 0.95
"""Of the time of a step: what a change has to bring to be worth a line."""
RUN = train.run_train
"""What is planned. Its module is imported so that this process has all libraries that a run has."""


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build. Raises ConfigError for a run that goes on, and for a sweep."""
    if HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN:
        raise ConfigError("plan takes one run at a time; leave -m out, and give each key one value")
    if node.get("resume") is not None:
        raise ConfigError(
            f"resume={node.resume}: plan is for new runs, and a run that goes on needs what it needed before; leave "
            "resume out"
        )
    node.card = node.get("card") or _card(typed)
    return resume.prepare(node, typed)


def _card(typed: Sequence[str]) -> str | None:
    """The card that a hardware option is named after, where this machine has no GPU."""
    chosen = [word.partition("=")[2] for word in typed if key_of(word) == "hardware"]
    if not chosen and HydraConfig.initialized():  # by a recipe, or a file of the user's
        chosen.append(str(HydraConfig.get().runtime.choices.get("hardware")))
    return card_of(chosen[-1]) if chosen and not torch.cuda.is_available() else None


def run_plan(config: PlanConfig, config_yaml: str) -> dict[str, Any]:
    """Print tables, or JSON, and return what JSON holds. Raises DppoError for what a run would refuse, too."""
    machine = find_machine(config.hardware, config.card)
    report = make_report(config, machine, psutil.Process().memory_info().rss)
    if config.json:
        print(json.dumps(report, indent=2, allow_nan=False))
    else:
        show(report)
    return report


def make_report(config: PlanConfig, machine: Machine, runtime: float) -> dict[str, Any]:
    """`runtime`: resident bytes of this process, which has imported what a run imports."""
    # Imported late: fake tensors bring libraries along that a run does not have.
    from dppo_cli.commands.planning.estimate import Planner
    from dppo_cli.commands.planning.seconds import seconds

    whole = config
    config, machine = share_of(config, machine)
    planner = Planner(machine, runtime, config.prompt_tokens)
    found = planner.estimate(config)
    other = replace(
        config, hardware=replace(config.hardware, gradient_checkpointing=not config.hardware.gradient_checkpointing)
    )
    fits, change = found.fits(machine), None
    if not fits:
        change = planner.change_that_fits(config, found)
    speed = machine.speed()
    took = seconds(config, found, machine, speed)
    faster = None
    if fits and (more := planner.more_at_once(config, found)) is not None:
        words, changed, needs = more
        step = seconds(changed, needs, machine, speed).step
        if step < WORTH * took.step:
            faster = {"words": words, "seconds_per_step": step, "peak_memory_gib": needs.memory.peak / GIB}
    checkpointed = {
        config.hardware.gradient_checkpointing: found.update.activations / GIB,
        other.hardware.gradient_checkpointing: planner.update(other).activations / GIB,
    }
    return {
        "peak_memory_gib": found.memory.peak / GIB,
        "fits": fits,
        "needed_gib": (found.memory.peak + found.memory.reserve) / GIB,
        "free_gib": machine.free / GIB,
        "total_gib": machine.total / GIB,
        "machine": machine.name,
        "device": machine.device,
        "dtype": _name(machine.dtype),
        "peak_phase": found.memory.peak_phase,
        "parts": _gib(found.memory.parts),
        "phases": {name: _gib(parts) for name, parts in found.memory.phases.items()},
        "activations_gib": {"plain": checkpointed[False], "gradient_checkpointing": checkpointed[True]},
        "change": None if change is None else {"words": change[0], "peak_memory_gib": change[1].memory.peak / GIB},
        "faster": faster,
        "seconds_per_step": took.step,
        "seconds": asdict(took),
        "hours": config.steps * took.step / 3600,
        "speed": asdict(speed),
        "model": {
            "path": config.model.path,
            "parameters": found.shapes.parameters,
            "trained_parameters": found.shapes.trained,
            "samples_with": str(found.memory.weights) if in_each_process(config.rollout) else "servers, not planned",
        },
        "prompts": {"mean": found.prompts.mean, "longest": found.prompts.longest, "source": found.prompts.source},
        "batch": batch(whole, found),
    }


def batch(config: PlanConfig, found: "Estimate") -> dict[str, Any]:
    """The arithmetic of the batch. `found`: of one process; what runs at once does in each."""
    plan, tokens = config.batch, config.sampling.max_new_tokens
    samples = plan.prompts_per_step * plan.samples_per_prompt
    updated = plan.prompts_per_update * plan.samples_per_prompt
    return {
        "prompts": plan.prompts_per_step,
        "samples_per_prompt": plan.samples_per_prompt,
        "samples": samples,
        "updates": plan.updates_per_step,
        "samples_per_update": updated,
        "micro_batches_per_update": found.update.micro_batches,
        "sampled_at_once": found.sampling.sequences,
        "tokens_per_step": samples * tokens,
        "tokens": samples * tokens * config.steps,
        "steps": config.steps,
        "processes": config.hardware.processes,
        "turns": turns_of(config.environment),
    }


def show(report: dict[str, Any]) -> None:
    """The report as tables."""
    batch, model, prompts = report["batch"], report["model"], report["prompts"]
    console = RichConsole(highlight=False)
    print_table(
        "plan",
        [
            ("model", f"{model['path']}, {model['parameters']:,} parameters, {model['trained_parameters']:,} trained"),
            (
                "a step",
                f"{batch['prompts']:,} prompts x {batch['samples_per_prompt']} samples = {batch['samples']:,} samples, "
                f"{batch['sampled_at_once']:,} at once; {batch['updates']} updates of {batch['samples_per_update']:,} "
                f"samples in up to {batch['micro_batches_per_update']:,} micro-batches",
            ),
            ("tokens", f"{batch['tokens_per_step']:,} a step at most, {batch['tokens']:,} in {batch['steps']:,} steps"),
            ("prompts", f"{prompts['mean']:.0f} tokens, {prompts['longest']:,} at most ({prompts['source']})"),
            ("samples with", model["samples_with"]),
            *_processes(batch["processes"], report["device"]),
            ("planned for", f"{report['machine']}, {report['dtype']}"),
        ],
        console,
    )
    _show_memory(report, console)
    seconds = report["seconds"]
    sampling = f"{_time(seconds['sampling'])} sampling" if seconds["sampling"] else "sampling by servers not counted"
    later = ", evaluations and later turns" if batch["turns"] > 1 else " and evaluations"
    rows = [
        ("peak", f"{report['peak_memory_gib']:.2f} GiB, in the phase: {report['peak_phase']}"),
        ("needs", f"{report['needed_gib']:.2f} GiB of {report['free_gib']:.1f} GiB free: {_verdict(report)}"),
        (
            "activations",
            f"{report['activations_gib']['plain']:.2f} GiB a micro-batch; with gradient checkpointing "
            f"{report['activations_gib']['gradient_checkpointing']:.2f} GiB",
        ),
        (
            "time",
            f"{_time(report['seconds_per_step'])} a step at most ({sampling}, {_time(seconds['update'])} updating), "
            f"{_time(3600 * report['hours'])} in all; rewards{later} not counted",
        ),
        *_faster(report["faster"]),
        ("speed", report["speed"]["source"]),
    ]
    print_table("estimate", rows, console)


def _processes(count: int, device: str) -> list[tuple[str, str]]:
    """A row, where there are several."""
    has = "GPU" if device == "cuda" else "share of the CPU and its memory"
    return (
        [("processes", f"{count}, each with its own {has}: what runs at once, and what follows, is of each")]
        if count > 1
        else []
    )


def _faster(faster: dict[str, Any] | None) -> list[tuple[str, str]]:
    """A row, where there is something."""
    if faster is None:
        return []
    needs = f"{_time(faster['seconds_per_step'])} a step at most, {faster['peak_memory_gib']:.2f} GiB at the peak"
    return [("faster", f"{faster['words']}: {needs}")]


def _show_memory(report: dict[str, Any], console: RichConsole) -> None:
    peak = report["phases"][report["peak_phase"]]
    table = Table(title="memory, GiB")
    table.add_column("part")
    for name in ("at the peak", "at most"):
        table.add_column(name, justify="right")
    for part, size in report["parts"].items():
        table.add_row(escape(part), f"{peak[part]:.2f}" if part in peak else "", f"{size:.2f}")
    table.add_section()
    for name, phase in report["phases"].items():
        table.add_row(escape(f"all, {name}"), "", f"{sum(phase.values()):.2f}")
    console.print(table)


def _verdict(report: dict[str, Any]) -> str:
    if report["fits"]:
        return "it fits"
    if report["change"] is None:
        return "it does not fit, and no single change that was tried makes it fit"
    return (
        f"it does not fit; with {report['change']['words']} it does ({report['change']['peak_memory_gib']:.2f} GiB at "
        "the peak)"
    )


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _gib(parts: dict[str, float]) -> dict[str, float]:
    """Bytes as GiB; parts of nothing left out."""
    return {name: size / GIB for name, size in parts.items() if size > 0}


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
