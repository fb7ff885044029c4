"""Sampling with static steps, for devices on which launching a step's kernels one by one takes longer than they run.

A sequence that ends makes room for the next one, so one long response does not hold the others up. Tokens are those of
sampling sub-batch by sub-batch, with the same seeds.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import PreTrainedModel

from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.graphs import Graphs
from dppo_cli.kernels.layer_parts import is_known, windows_of
from dppo_cli.kernels.slots import Room
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.blocks import Blocks, Pace, rounded_up
from dppo_cli.rollout.copies import Sampler
from dppo_cli.rollout.frequencies import are_fixed, check_length
from dppo_cli.rollout.sampling import Sampled, Wanted
from dppo_cli.rollout.static import Prefilled, StaticSequences
from dppo_cli.rollout.stop_strings import StopStrings

ON_CUDA = Pace(steps=8, ahead=1)
KEPT = 0.1
"""Of the device's memory: slots that take no more than this stay, with their graphs, while the policy trains."""

AT_ONCE = 3
"""Places for prompts, as a multiple of the prompts whose samples fill all slots. A prompt keeps its place for its last
sample, so there can be as many as slots, but places for all of them would take what sharing saves. With the lengths of
`refilled` in benchmarks/gpu_decode.py, a place for each slot instead saves 2% of the steps at most (simulated)."""


def refuses(model: PreTrainedModel) -> str | None:
    """Why `Refilling` cannot sample from a model; None if it can."""
    if not is_known(model) or windows_of(model) is None:
        return "there are no static steps for this model"
    return None if are_fixed(model) else "its rotary frequencies depend on the longest sequence"


def room_for(wanted: Wanted, slots: int, pace: Pace) -> Room:
    """What a call takes, with so many slots at most."""
    slots = min(slots, len(wanted.prompts) * wanted.group)
    longest = max(len(prompt.token_ids) for prompt in wanted.prompts)
    return Room(
        prompts=min(slots, len(wanted.prompts), AT_ONCE * -(-slots // wanted.group)),
        prompt_positions=rounded_up(longest, pace.width),
        slots=slots,
        positions=rounded_up(wanted.sampling.max_new_tokens, pace.width),
    )


class Refilling:
    """Keeps slots and graphs from call to call where the weights stay where they are. `slots`: sequences at once."""

    def __init__(self, policy: Policy, slots: int, warn: Callable[[str], None], pace: Pace = ON_CUDA) -> None:
        self.policy, self.slots, self.warn, self.pace = policy, slots, warn, pace
        self.graphs = Graphs(policy.device, warn)
        self.sequences: StaticSequences | None = None

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
        self, sampler: Sampler, wanted: Wanted, stops: StopStrings | None = None
    ) -> Iterator[tuple[int, list[Sampled]]]:
        """Each prompt's number and its responses, when they have all ended.

        Raises ModelError for responses whose log-probs could not be those of training.
        """
        longest = max(len(prompt.token_ids) for prompt in wanted.prompts)
        check_length(sampler.model, longest, wanted.sampling.max_new_tokens)
        room = room_for(wanted, self.slots, self.pace)
        opened = partial(self._opened, sampler, wanted, room)
        stay = False
        try:
            blocks = Blocks(sampler, wanted, self.pace, room, self.policy.pad_id, self.graphs, opened, stops)
            yield from blocks.groups()
            stay = self._may_stay()
        finally:
            if not stay:
                self.release()

    def _opened(self, sampler: Sampler, wanted: Wanted, room: Room, like: Prefilled) -> StaticSequences:
        """Empty slots: those of the last call, if they are of the same model and there is room in them.

        Others have room for this call and for those before it, so that calls that alternate do not make new ones.
        """
        if self.sequences is not None and self.sequences.sampler.model is sampler.model:
            room = room.with_room_for(self.sequences.room)
        else:
            self.release()
        if self.sequences is None or self.sequences.room != room:
            self.release()
            self.sequences = StaticSequences(sampler, room, self.policy.eos_ids, like, self.warn)
        self.sequences.begin(sampler, wanted.sampling, wanted.num_logprobs)
        return self.sequences

    def _may_stay(self) -> bool:
        if (
            self.policy.device.type != CUDA
            or self.sequences is None
            or self.sequences.sampler.model is not self.policy.model
        ):
            return False  # A copy has its weights elsewhere each time.
        total = torch.cuda.get_device_properties(self.policy.device).total_memory
        return self.sequences.num_bytes <= KEPT * total
