"""Seconds from work and speed. That plans come near what was measured is in docs/plan.md."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dppo_cli.commands.planning.machine import Speed
from dppo_cli.commands.planning.seconds import seconds
from dppo_cli.commands.planning.simulate import Work

SPEED = Speed(flops=100.0, bytes_per_second=10.0, seconds_per_operation=0.5, source="made up")
BASE = 300.0
"""Bytes of the weights."""


def planned(on_cpu: bool, slots: int) -> Any:
    """Two sub-batches of 5 tokens each, and two updates."""
    config: Any = SimpleNamespace(sampling=SimpleNamespace(max_new_tokens=5), batch=SimpleNamespace(updates_per_step=2))
    sampling = SimpleNamespace(
        token=Work(flops=100, made=10, operations=80), prefill=Work(9000, 20, 40), cache=50, slots=slots
    )
    found: Any = SimpleNamespace(
        shapes=SimpleNamespace(base_bytes=BASE, parameters=0),
        memory=SimpleNamespace(weights=SimpleNamespace(copied=False, dtype=torch.bfloat16)),
        sampling=sampling,
        update=SimpleNamespace(work=Work(2000, 100, 200)),
        sub_batches=2,
    )
    machine: Any = SimpleNamespace(on_cpu=on_cpu)
    return seconds(config, found, machine, SPEED)


@pytest.mark.parametrize(
    ("on_cpu", "slots", "token", "prefill", "update"),
    [
        # Products, or the weights and the cache; what is made, written and read; operations.
        (True, 0, 35 + 2 + 40, 90 + 4 + 20, 20 + 20 + 100),
        # The host launches what the device computes meanwhile.
        (False, 0, 40, 90 + 4, 100),
        # It launches none of a graph.
        (False, 8, 35 + 2, 90 + 4, 100),
    ],
)
def test_seconds(on_cpu: bool, slots: int, token: float, prefill: float, update: float) -> None:
    found = planned(on_cpu, slots)
    assert found.sampling == pytest.approx(2 * (prefill + 5 * token)) and found.update == pytest.approx(2 * update)
    assert found.step == found.sampling + found.update
