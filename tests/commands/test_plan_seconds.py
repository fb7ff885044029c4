"""Seconds from work and speed. That plans come near what was measured is in docs/plan.md, too."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dppo_cli.commands.planning.machine import Speed
from dppo_cli.commands.planning.recorder import Work
from dppo_cli.commands.planning.seconds import seconds

SPEED = Speed(flops=100.0, bytes_per_second=10.0, seconds_per_operation=0.5, source="made up", float32=40.0)
BASE = 300.0
"""Bytes of the weights."""


def planned(on_cpu: bool, slots: int, decoded: float = 0.0) -> Any:
    """Two sub-batches of 5 tokens each, whose prompts run three at a time, and two updates."""
    config: Any = SimpleNamespace(sampling=SimpleNamespace(max_new_tokens=5), batch=SimpleNamespace(updates_per_step=2))
    token, prefill = Work(flops=100, made=10, operations=80, decoded=decoded), Work(9000, 20, 40)
    sampling = SimpleNamespace(token=token, prefill=prefill, read=50, slots=slots)
    found: Any = SimpleNamespace(
        shapes=SimpleNamespace(base_bytes=BASE, parameters=0),
        memory=SimpleNamespace(weights=SimpleNamespace(copied=False, dtype=torch.bfloat16)),
        sampling=sampling,
        update=SimpleNamespace(work=Work(2000, 100, 200)),
        prefills=3,
        sub_batches=2,
    )
    machine: Any = SimpleNamespace(on_cpu=on_cpu)
    return seconds(config, found, machine, SPEED)


@pytest.mark.parametrize(
    ("on_cpu", "slots", "decoded", "token", "prefill", "update"),
    [
        # Products, or the weights and the cache; what is made, written and read; operations.
        (True, 0, 0, 35 + 2 + 40, 90 + 4 + 20, 20 + 20 + 100),
        # The host launches what the device computes meanwhile.
        (False, 0, 0, 40, 90 + 4, 100),
        # It launches none of a graph.
        (False, 8, 0, 35 + 2, 90 + 4, 100),
        # Products that decode 20 weights read, decode and compute.
        (False, 8, 20, 35 + 6 + 1 + 2, 90 + 4, 100),
    ],
)
def test_seconds(on_cpu: bool, slots: int, decoded: float, token: float, prefill: float, update: float) -> None:
    found = planned(on_cpu, slots, decoded)
    assert found.sampling == pytest.approx(3 * prefill + 2 * 5 * token) and found.update == pytest.approx(2 * update)
    assert found.step == found.sampling + found.update
