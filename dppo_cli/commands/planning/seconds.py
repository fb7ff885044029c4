"""Seconds of a step, from the work that it is and the speed of the machine."""

from dataclasses import dataclass

from dppo_cli.commands.planning.estimate import Estimate
from dppo_cli.commands.planning.machine import Machine, Speed
from dppo_cli.commands.planning.simulate import Work
from dppo_cli.commands.schemas import TrainConfig


@dataclass(frozen=True)
class Seconds:
    """Of a step in which every response has the most tokens and every sample is trained on."""

    sampling: float
    update: float

    @property
    def step(self) -> float:
        return self.sampling + self.update


def seconds(config: TrainConfig, found: Estimate, machine: Machine, speed: Speed) -> Seconds:
    """Sampling reads the weights and the cache for every token; an update reads and writes what it makes."""
    shapes, weights, on_cpu = found.shapes, found.memory.weights, machine.on_cpu
    # 4-bit weights are dequantised for every token, which the work of a token has already.
    read = (shapes.parameters if weights.copied else 0) * weights.dtype.itemsize or shapes.base_bytes
    tokens = config.sampling.max_new_tokens
    # Slots are for steps that a GPU replays as graphs, without the host.
    launched = found.sampling.slots == 0 or on_cpu
    token = _seconds(found.sampling.token, speed, read + found.sampling.cache, on_cpu, launched)
    prefill = _seconds(found.sampling.prefill, speed, read, on_cpu)
    update = config.batch.updates_per_step * _seconds(found.update.work, speed, 0.0, on_cpu)
    return Seconds(found.sub_batches * (prefill + tokens * token), update)


def _seconds(work: Work, speed: Speed, read: float, on_cpu: bool, launched: bool = True) -> float:
    """Products wait for weights or compute, whichever takes longer; other operations move what is made twice.

    A CPU has each operation's own least time in addition; a GPU works while the host launches the next ones.
    """
    products = max(work.flops / speed.flops, read / speed.bytes_per_second)
    computing = products + 2 * work.made / speed.bytes_per_second
    host = work.operations * speed.seconds_per_operation if launched else 0.0
    return computing + host if on_cpu else max(computing, host)
