"""Seconds of a step, from the work that it is and the speed of the machine."""

from dataclasses import dataclass

from dppo_cli.commands.planning.estimate import Estimate
from dppo_cli.commands.planning.machine import Machine, Speed
from dppo_cli.commands.planning.recorder import Work
from dppo_cli.commands.schemas import TrainConfig

DECODING = 12
"""FLOPs in float32 that take as long as decoding a weight from 4 bits. In the machine code of `fused.nf4` for an H100
are 5.6 to 6.9 instructions a weight; an instruction could be a multiplication and addition, which count as two."""


@dataclass(frozen=True)
class Seconds:
    """Of a step in which every response has the most tokens and every sample is trained on."""

    sampling: float
    update: float

    @property
    def step(self) -> float:
        return self.sampling + self.update


def seconds(config: TrainConfig, found: Estimate, machine: Machine, speed: Speed) -> Seconds:
    """Sampling reads the weights and what is in the cache for every token; an update reads and writes what it makes."""
    shapes, weights, sampling, on_cpu = found.shapes, found.memory.weights, found.sampling, machine.on_cpu
    # Weights in 4 bits that each product dequantises are made for every token, which the work of a token has already.
    read = (shapes.parameters if weights.copied else 0) * weights.dtype.itemsize or shapes.base_bytes
    # Slots are for steps that a GPU replays as graphs, without the host.
    launched = sampling.slots == 0 or on_cpu
    token = _seconds(sampling.token, speed, read + sampling.read, on_cpu, launched)
    prefill = _seconds(sampling.prefill, speed, read, on_cpu)
    update = config.batch.updates_per_step * _seconds(found.update.work, speed, 0.0, on_cpu)
    tokens = found.sub_batches * config.sampling.max_new_tokens
    return Seconds(found.prefills * prefill + tokens * token, update)


def _seconds(work: Work, speed: Speed, read: float, on_cpu: bool, launched: bool = True) -> float:
    """Products wait for weights or compute, whichever takes longer; other operations move what is made twice.

    Products that decode their weights do one after the other: each program reads codes, decodes them and multiplies. A
    CPU has each operation's own least time in addition; a GPU works while the host launches the next ones.
    """
    products, reading = work.flops / speed.flops, read / speed.bytes_per_second
    if work.decoded:
        products += reading + DECODING * work.decoded / speed.float32
    computing = max(products, reading) + 2 * work.made / speed.bytes_per_second
    host = work.operations * speed.seconds_per_operation if launched else 0.0
    return computing + host if on_cpu else max(computing, host)
