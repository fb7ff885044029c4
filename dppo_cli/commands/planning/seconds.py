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
    shapes, weights = found.shapes, found.memory.weights
    # 4-bit weights are dequantised for every token, which the work of a token has already.
    read = (shapes.parameters if weights.copied else 0) * weights.dtype.itemsize or shapes.base_bytes
    tokens = config.sampling.max_new_tokens
    token = _seconds(found.sampling.token, speed, read + found.sampling.cache)
    sampling = found.sub_batches * (_seconds(found.sampling.prefill, speed, read) + tokens * token)
    update = config.batch.updates_per_step * _seconds(found.update.work, speed, 0.0)
    return Seconds(sampling, update)


def _seconds(work: Work, speed: Speed, read: float) -> float:
    """Products wait for weights or compute, whichever takes longer; other operations move what is made twice."""
    products = max(work.flops / speed.flops, read / speed.bytes_per_second)
    return products + 2 * work.made / speed.bytes_per_second + work.operations * speed.seconds_per_operation
