"""How fast this machine is, as `dppo plan` measures it."""

import math
from itertools import count

import torch

from dppo_cli.commands.planning import machine


def test_a_busy_machine_is_measured_at_least_once(monkeypatch):
    """Where one try takes longer than all of them should."""
    clock = count(0, 10)
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(clock)))
    speed = machine.calibrate(torch.device("cpu"), torch.float32)
    assert speed.bytes_per_second == 2 * machine.COPIED / 10
    assert 0 < speed.flops < math.inf and speed.seconds_per_operation == 0.1
