"""What one of several processes has of a run and of the machine: plans are for the process with the most."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import ceil

from dppo_cli.commands.planning.machine import Machine, Speed
from dppo_cli.commands.schemas import PlanConfig


def share_of(config: PlanConfig, machine: Machine) -> tuple[PlanConfig, Machine]:
    """Groups are never cut, so a process has whole ones; it has a GPU of its own, or a part of the CPU."""
    processes, batch = config.hardware.processes, config.batch
    if processes == 1:
        return config, machine
    updated = ceil(batch.prompts_per_update / processes)
    part = replace(
        batch, prompts_per_update=updated, prompts_per_step=updated * batch.prompts_per_step // batch.prompts_per_update
    )
    if machine.on_cpu:
        machine = replace(
            machine,
            total=machine.total / processes,
            free=machine.free / processes,
            speed=partial(_part, machine.speed, processes),
        )
    return replace(config, batch=part), machine


def _part(whole: Callable[[], Speed], processes: int) -> Speed:
    speed = whole()
    return replace(
        speed,
        flops=speed.flops / processes,
        float32=speed.float32 / processes,
        bytes_per_second=speed.bytes_per_second / processes,
        source=f"{speed.source}; a share of 1/{processes} for each process",
    )
