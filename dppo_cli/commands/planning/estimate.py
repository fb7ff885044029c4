"""The whole estimate for a config: prompts, memory, time; and the one change that makes it fit."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any, TypeVar

from dppo_cli.commands.planning.machine import Machine
from dppo_cli.commands.planning.memory import Memory, memory, sampling_weights
from dppo_cli.commands.planning.prompts import Prompts, find_prompts, later_turn
from dppo_cli.commands.planning.sampling import Products, SamplingCost, sampling_cost
from dppo_cli.commands.planning.shapes import Shapes, Source, make_shapes, read_source
from dppo_cli.commands.planning.update import UpdateCost, update_cost
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.conf_tree import config_dir
from dppo_cli.config.sections import Model
from dppo_cli.environment.environment import turns_of
from dppo_cli.errors import DppoError
from dppo_cli.kernels.slots import Room
from dppo_cli.policy.location import EMBEDDED
from dppo_cli.rollout.engine import in_each_process
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.rollout.refill import ON_CUDA, refuses, room_for
from dppo_cli.rollout.sampling import Wanted
from dppo_cli.rollout.weights import SamplingWeights

T = TypeVar("T")

SPARE = 0.9
"""Of the free memory: most of it that a change which is only for speed may need."""
SMALLEST_BUDGET = 64
"""Tokens of a micro-batch below which an update only gets slower."""
PARAMETERS = re.compile(r"([\d.]+) (billion|million) parameters")
"""As the headers of conf/model/*.yaml have it."""


@dataclass(frozen=True)
class Estimate:
    """What a config needs. `prefills`: how often prompts run in a step, as many as `sampling` has at once.

    That and `sub_batches` are 0 where servers sample.
    """

    shapes: Shapes
    prompts: Prompts
    memory: Memory
    sampling: SamplingCost
    prefills: int
    sub_batches: int
    update: UpdateCost

    def fits(self, machine: Machine) -> bool:
        return self.memory.peak + self.memory.reserve <= machine.free


@dataclass
class Planner:
    """Keeps what several estimates share: of the changes that are tried, most leave the model as it is."""

    machine: Machine
    runtime: float
    prompt_tokens: int | None
    sources: dict[Model, Source] = field(default_factory=dict)
    shapes: dict[Any, Shapes] = field(default_factory=dict)
    prompts: dict[Any, Prompts] = field(default_factory=dict)
    costs: dict[str, Any] = field(default_factory=dict)

    def estimate(self, config: TrainConfig) -> Estimate:
        """Raises DppoError for a model, an adapter or prompts that a run would refuse, too."""
        source, shapes, prompts = self.source(config.model), self._shapes(config), self._prompts(config)
        weights = sampling_weights(config, shapes, self.machine, self.runtime)
        sampling, update = self._sampling(config, weights), self.update(config)
        found = memory(config, source, shapes, self.machine, self.runtime, weights, sampling, update)
        batch = config.batch
        here = in_each_process(config.rollout)
        prefills = here * math.ceil(batch.prompts_per_step / sampling.prompts)
        sub_batches = here * math.ceil(batch.prompts_per_step * batch.samples_per_prompt / sampling.sequences)
        return Estimate(shapes, prompts, found, sampling, prefills, sub_batches, update)

    def update(self, config: TrainConfig) -> UpdateCost:
        shapes, batch = self._shapes(config), config.batch
        return self._once(
            (id(shapes), config.sampling, config.approx, config.hardware),
            partial(
                update_cost,
                shapes,
                self._prompts(config).step[: batch.prompts_per_update],
                batch.samples_per_prompt,
                config.sampling.max_new_tokens,
                config.hardware,
                config.approx,
                config.kl_to_reference > 0,
            ),
        )

    def _sampling(self, config: TrainConfig, weights: SamplingWeights) -> SamplingCost:
        """The work of training, with memory for evaluations, too: with one sample a prompt more prompts run at once.

        The same holds for later turns, in which each sample goes on by itself.
        """
        shapes, prompts = self._shapes(config), self._prompts(config)
        if not in_each_process(config.rollout):
            size = len(prompts.step)
            return SamplingCost.elsewhere(size, size * config.batch.samples_per_prompt)
        training = Wanted(
            prompts.step, config.batch.samples_per_prompt, config.sampling, config.approx.num_logprobs, ()
        )
        evaluation = Wanted(prompts.heldout, config.eval.samples_per_prompt, config.eval_sampling, 0, ())
        calls = [training, evaluation, *([] if turns_of(config.environment) == 1 else [later_turn(training)])]
        concurrent, room = len(prompts.step) * training.group, None
        if isinstance(config.rollout, LocalRollout):
            concurrent = config.rollout.concurrent_sequences
            if not self.machine.on_cpu and refuses(shapes.policy.model) is None:
                rooms = [room_for(wanted, concurrent, ON_CUDA) for wanted in calls]
                room = reduce(Room.with_room_for, rooms)
        products = Products(weights.copied, self.machine.decoded_for if room is not None else 0)

        def every() -> SamplingCost:
            costs = [sampling_cost(shapes, wanted, concurrent, products, room) for wanted in calls]
            return reduce(SamplingCost.with_memory_for, costs)

        # Layers recompute in training alone.
        of = (config.model, str(config.adapter), config.sampling, config.approx)
        return self._once((*of, concurrent, products, room, len(calls)), every)

    def _once(self, key: Any, work: Callable[[], T]) -> T:
        """Batch, KL term and prompts are the same in every estimate, so they are no part of a key."""
        if str(key) not in self.costs:
            self.costs[str(key)] = work()
        found: T = self.costs[str(key)]
        return found

    def source(self, model: Model) -> Source:
        if model not in self.sources:
            self.sources[model] = read_source(model)
        return self.sources[model]

    def _shapes(self, config: TrainConfig) -> Shapes:
        machine, hardware = self.machine, config.hardware
        key = (config.model, str(config.adapter), hardware.gradient_checkpointing)
        if key not in self.shapes:
            self.shapes[key] = make_shapes(
                self.source(config.model), config.adapter, hardware, machine.dtype, machine.on_cpu
            )
        return self.shapes[key]

    def _prompts(self, config: TrainConfig) -> Prompts:
        key = (config.model, config.sampling.max_new_tokens)
        if key not in self.prompts:
            self.prompts[key] = find_prompts(config, self._shapes(config).policy, self.prompt_tokens)
        return self.prompts[key]

    def more_at_once(self, config: TrainConfig, now: Estimate) -> tuple[str, TrainConfig, Estimate] | None:
        """More sequences sampled at once, in words, as a config, and what it needs: all of a step, or half, and so on.

        None where all are sampled at once already, or more would need more than `SPARE`.
        """
        rollout, group = config.rollout, config.batch.samples_per_prompt
        if not isinstance(rollout, LocalRollout):
            return None
        prompts = len(now.prompts.step)
        while (concurrent := prompts * group) > rollout.concurrent_sequences:
            least = now.memory.least + now.sampling.cache * concurrent / max(1, now.sampling.sequences)
            if least < SPARE * self.machine.free:
                more = replace(config, rollout=replace(rollout, concurrent_sequences=concurrent))
                found = self.estimate(more)
                if found.memory.peak + found.memory.reserve <= SPARE * self.machine.free:
                    return f"rollout.concurrent_sequences={concurrent}", more, found
            prompts //= 2
        return None

    def change_that_fits(self, config: TrainConfig, now: Estimate) -> tuple[str, Estimate] | None:
        """The first single change with which it fits, in words of the command line, and the estimate with it."""
        # Where the weights alone are too much, only other weights can help.
        too_heavy = now.memory.least > self.machine.free
        at_once = max(
            len(now.prompts.step) * config.batch.samples_per_prompt,
            len(now.prompts.heldout) * config.eval.samples_per_prompt,
        )
        for words, changed in changes(config, now.memory.peak_phase, now.shapes.parameters, at_once):
            if too_heavy and (changed.model, changed.adapter) == (config.model, config.adapter):
                continue
            try:
                found = self.estimate(changed)
            except DppoError:
                continue  # This model cannot take it.
            if found.fits(self.machine):
                return words, found
        return None


def changes(config: TrainConfig, phase: str, parameters: int, at_once: int) -> Iterator[tuple[str, TrainConfig]]:
    """Single changes that may lower a phase. First those that leave the method as it is, then those that change it.

    `at_once`: sequences that there are to be sampled at once, if there is room for all of them.
    """
    hardware, rollout = config.hardware, config.rollout
    updating = phase.startswith("update")
    if updating:
        budget = hardware.tokens_per_micro_batch
        while (budget := budget // 2) >= SMALLEST_BUDGET:
            changed = replace(hardware, tokens_per_micro_batch=budget)
            yield f"hardware.tokens_per_micro_batch={budget}", replace(config, hardware=changed)
        if not hardware.gradient_checkpointing:
            changed = replace(hardware, gradient_checkpointing=True)
            yield "hardware.gradient_checkpointing=true", replace(config, hardware=changed)
    elif isinstance(rollout, LocalRollout):
        concurrent = min(rollout.concurrent_sequences, at_once)
        while (concurrent := concurrent // 2) >= config.batch.samples_per_prompt:
            fewer = replace(rollout, concurrent_sequences=concurrent)
            yield f"rollout.concurrent_sequences={concurrent}", replace(config, rollout=fewer)
        own = "adapter" if config.adapter.quantization is None else "quantized"
        if rollout.weights != own and rollout.dtype is None:
            yield f"rollout.weights={own}", replace(config, rollout=replace(rollout, weights=own))
    if config.adapter.quantization is None and config.model.gguf_file is None:
        yield "adapter=qlora", replace(config, adapter=replace(config.adapter, quantization="nf4"))
    tokens = config.sampling.max_new_tokens
    while (tokens := tokens // 2) >= SMALLEST_BUDGET:
        shorter = replace(config.sampling, max_new_tokens=tokens)
        yield f"sampling.max_new_tokens={tokens}", replace(config, sampling=shorter)
    for choice, model in smaller_models(parameters):
        yield f"model={choice}", replace(config, model=model)


def smaller_models(parameters: int) -> Iterator[tuple[str, Model]]:
    """The choices of conf/model with fewer parameters, the largest first; at last the model in the package."""
    found: list[tuple[float, str, Model]] = []
    for file in sorted((config_dir() / "model").glob("*.yaml")):
        text = file.read_text(encoding="utf-8")
        size, path = PARAMETERS.search(text), re.search(r"^  path: (\S+)$", text, flags=re.MULTILINE)
        if path is None or path[1] == "???":
            continue
        count = float(size[1]) * (1e9 if size[2] == "billion" else 1e6) if size else 1e6
        if count < parameters and (size or path[1].startswith(EMBEDDED)):
            found.append((count, file.stem, Model(path[1], None, None)))
    for _, choice, model in sorted(found, key=lambda each: -each[0]):
        yield choice, model
