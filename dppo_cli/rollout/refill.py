"""Sampling with static steps, for devices on which launching a step's kernels one by one takes longer than they run.

A sequence that ends makes room for the next one, so one long response does not hold the others up. Tokens are those of
sampling sub-batch by sub-batch, with the same seeds.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from dppo_cli.config.sections import Sampling
from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.graphs import Graphs
from dppo_cli.kernels.llama import is_built_like_llama
from dppo_cli.kernels.slots import has_fixed_frequencies
from dppo_cli.policy.forward import keeps_every_position
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.blocks import Blocks, Pace, Sampled, Wanted
from dppo_cli.rollout.copies import Sampler
from dppo_cli.rollout.static import Prefilled, StaticSequences
from dppo_cli.types import Prompt

ON_CUDA = Pace(steps=8, ahead=1)
KEPT = 0.1
"""Of the device's memory: slots that take no more than this stay, with their graphs, while the policy trains."""


def refuses(model: PreTrainedModel, sampling: Sampling | None = None) -> str | None:
    """Why `Refilling` cannot sample from a model, or with these options; None if it can."""
    if not (keeps_every_position(model) and is_built_like_llama(model) and has_fixed_frequencies(model)):
        return "the model is not built like Llama"
    # They are looked for on the host, at every step.
    return "there are stop strings" if sampling is not None and sampling.stop else None


class Refilling:
    """Keeps slots and graphs from call to call where the weights stay where they are. `slots`: sequences at once."""

    def __init__(self, policy: Policy, slots: int, warn: Callable[[str], None], pace: Pace = ON_CUDA) -> None:
        self.policy, self.slots, self.warn, self.pace = policy, slots, warn, pace
        self.graphs = Graphs(policy.device, warn)
        self.sequences: StaticSequences | None = None
        self.of: tuple[object, ...] = ()

    def how(self, model: PreTrainedModel) -> str:
        """In words, for the user."""
        why_not = refuses(model)
        return "steps in CUDA graphs" if why_not is None else f"each kernel by itself ({why_not})"

    def release(self) -> None:
        """Give back the memory of slots and graphs."""
        self.sequences = None
        self.graphs.release()

    # Of a generator torch ends the mode at each yield.
    @torch.inference_mode()
    def sample(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        group: int,
        sampling: Sampling,
        num_logprobs: int,
        seeds: Sequence[int],
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """Each prompt's number and its `group` responses, when they have all ended. `seeds`: see `Wanted`."""
        wanted = Wanted(prompts, group, sampling, num_logprobs, seeds)
        slots = min(self.slots, len(prompts) * group)
        opened = partial(self._opened, sampler, wanted, slots)
        stay = False
        try:
            yield from Blocks(sampler, wanted, self.pace, slots, self.policy.pad_id, self.graphs, opened).groups()
            stay = self._may_stay()
        finally:
            if not stay:
                self.release()

    def _opened(self, sampler: Sampler, wanted: Wanted, slots: int, like: Prefilled) -> StaticSequences:
        """Empty slots: those of the last call, if they are of the same kind, long enough, and there are enough."""
        of = (sampler.model, wanted.sampling, wanted.num_logprobs)
        if self.sequences is None or self.of != of or not self.sequences.has_room(slots, wanted.longest):
            self.release()
            capacity = -(-wanted.longest // self.pace.width) * self.pace.width
            self.sequences = StaticSequences(
                *(sampler, wanted.sampling, wanted.num_logprobs, slots, capacity, self.policy.eos_ids, like, self.warn)
            )
            self.of = of
        self.sequences.begin(sampler)
        return self.sequences

    def _may_stay(self) -> bool:
        if self.policy.device.type != CUDA or self.sequences is None or self.of[0] is not self.policy.model:
            return False  # A copy has its weights elsewhere each time.
        total = torch.cuda.get_device_properties(self.policy.device).total_memory
        return self.sequences.num_bytes <= KEPT * total
