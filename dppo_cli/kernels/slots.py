"""Keys and values of sequences in places of a fixed size, and a decoding step whose shapes and addresses are fixed.

A prompt has a place, which all of its samples read; what a sample writes is in a slot of its own. Both hold a sequence
from its first position on, so different lengths need no padding, and another sequence can take a place while the others
go on. The host reads nothing: a CUDA graph can replay a step.

Shapes: P places of prompts, S slots, M positions of all of them, R rows (the first R slots take part in a step), X
positions that a step reads, K key heads, Q query heads per key head, D head size, H hidden size, N prompts, L prompt
positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from dppo_cli.kernels.beside import Beside
from dppo_cli.kernels.devices import empty_cache
from dppo_cli.kernels.flash import CLOSE, LONGEST, ROWS, FlashOverSlots, OverSlots, difference, has_flash
from dppo_cli.kernels.layer_parts import windows_of
from dppo_cli.kernels.probe import refused, without_triton
from dppo_cli.kernels.token_step import Attend, TokenStep

WITHOUT_SPLIT = "attention of a decoding step takes several kernels, because that in Triton does not work here: {}"
WITHOUT_FLASH = "attention reads more of the cache than is in use, because torch's flash kernel does not work here: {}"


@dataclass(frozen=True)
class Room:
    """`prompts` places of `prompt_positions` each, `slots` of `positions` each."""

    prompts: int
    prompt_positions: int
    slots: int
    positions: int

    @property
    def of_prompts(self) -> int:
        return self.prompts * self.prompt_positions

    @property
    def all_positions(self) -> int:
        return self.of_prompts + self.slots * self.positions

    def with_room_for(self, other: "Room") -> "Room":
        """The smallest that has room for what either has room for."""
        return Room(
            max(self.prompts, other.prompts),
            max(self.prompt_positions, other.prompt_positions),
            max(self.slots, other.slots),
            max(self.positions, other.positions),
        )


Shown = Callable[[Tensor], Tensor]
"""What attention is given of a layer's keys, or values, [M, K, D]."""
Write = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
"""Puts new keys and values [R, K, 1, D] into pools of keys and of values [M, K, D] at positions int64 [R]."""


def write_each(keys_MKD: Tensor, values_MKD: Tensor, at_R: Tensor, keys_RK1D: Tensor, values_RK1D: Tensor) -> None:
    for pool, new in ((keys_MKD, keys_RK1D), (values_MKD, values_RK1D)):
        pool.index_copy_(0, at_R, new.squeeze(2))


class SlotStates:
    """Keys and values of one layer, [M, K, D], written where `Decoding` says. As `TokenStep` asks a cache for them.

    They begin as zeros: what is behind a sequence's end has no weight in its attention, but zero times NaN is NaN.
    """

    def __init__(self, room: Room, like_NLKD: Tensor, write: Write = write_each) -> None:
        self.room, self.write = room, write
        shape = (room.all_positions, *like_NLKD.shape[2:])
        self.keys, self.values = like_NLKD.new_zeros(shape), like_NLKD.new_zeros(shape)
        self.at_R = torch.empty(0)
        self.shown: Shown = _whole

    def look(self, at_R: Tensor, shown: Shown) -> None:
        """The next `update` writes to `at_R` and gives what `shown` makes of the keys and of the values."""
        self.at_R, self.shown = at_R, shown

    def update(self, keys_RK1D: Tensor, values_RK1D: Tensor) -> tuple[Tensor, Tensor]:
        self.write(self.keys, self.values, self.at_R, keys_RK1D, values_RK1D)
        return self.shown(self.keys), self.shown(self.values)

    def put(self, place_N: Tensor, keys_NLKD: Tensor, values_NLKD: Tensor) -> None:
        """Prompts' states, from a place's first position on."""
        for pool, new in ((self.keys, keys_NLKD), (self.values, values_NLKD)):
            of_prompts(pool, self.room)[:, : new.shape[1]].index_copy_(0, place_N, new)

    def move(self, from_M: Tensor, to_M: Tensor, width: int) -> None:
        """What is in the first `width` positions of slots, to other slots."""
        for pool in (self.keys, self.values):
            own = of_slots(pool, self.room)
            own[to_M, :width] = own[from_M, :width]


def of_prompts(pool_MKD: Tensor, room: Room) -> Tensor:
    """[P, positions of a place, K, D]."""
    return pool_MKD[: room.of_prompts].view(room.prompts, room.prompt_positions, *pool_MKD.shape[1:])


def of_slots(pool_MKD: Tensor, room: Room) -> Tensor:
    """[S, positions of a slot, K, D]."""
    return pool_MKD[room.of_prompts :].view(room.slots, room.positions, *pool_MKD.shape[1:])


def _whole(pool_MKD: Tensor) -> Tensor:
    return pool_MKD


class Decoding:
    """`step` for one token of each of the first R slots. See `TokenStep` for the models that it computes.

    `like`: keys of any prompts [N, L, K, D], for each layer; their precision is that in which the model computes.
    `warn` is told if a faster attention (see `over_slots`) should work here and does not. Layers with a window keep all
    positions, and read those that it shows.
    """

    def __init__(self, model: PreTrainedModel, room: Room, like: Sequence[Tensor], warn: Callable[[str], None]) -> None:
        self.room = room
        device, dtype = like[0].device, like[0].dtype
        make, write = over_slots(room, model.config.get_text_config().num_attention_heads, like[0], warn)
        longest = room.prompt_positions + room.positions
        # One that no sequence reaches is none.
        windows = [w if w is not None and w < longest else None for w in windows_of(model) or ()]
        self.windows = set(windows)
        self.flash: dict[int | None, OverSlots] = {} if make is None else {window: make() for window in self.windows}
        self.states = [SlotStates(room, states, write) for states in like]
        self.beside = Beside(dtype, warn)

        def attend(window: int | None) -> Attend:
            return self.flash.get(window, scaled_dot_product_attention)

        self.run = TokenStep(model, windows, self.beside, attend)
        if self.beside.wholes:
            empty_cache(device)  # of the weights that were copied to be beside each other
        self.start_S = torch.arange(room.slots, device=device) * room.positions + room.of_prompts
        self.position_X = torch.arange(max(room.prompt_positions, room.positions), device=device)

    def step(self, token_R: Tensor, place_R: Tensor, prompt_R: Tensor, length_R: Tensor, width: int) -> Tensor:
        """Final hidden states [R, H] of tokens int64 [R], each at the position after `length_R` positions of its slot.

        Before those are the `prompt_R` positions, one at least, of the prompt in place `place_R`. `width`: more than
        every length; the work grows with it, unless `flash` reads true lengths.
        """
        rows, room = len(token_R), self.room
        start_R, position_R = self.start_S[:rows], prompt_R + length_R
        masks: dict[int | None, Tensor] = {}
        shown: Shown = _whole
        for window in self.windows:
            # Positions that are not seen any more, of the prompt and of what was written.
            past_R = torch.zeros_like(prompt_R) if window is None else (position_R + 1 - window).clamp(min=0)
            past_prompt_R = past_R.minimum(prompt_R)
            past_own_R = past_R - past_prompt_R
            if self.flash:
                stretches = place_R * room.prompt_positions + past_prompt_R, start_R + past_own_R
                self.flash[window].look(*stretches, prompt_R - past_prompt_R, length_R + 1 - past_own_R)
            else:
                of_prompt, own = self.position_X[: room.prompt_positions], self.position_X[:width]
                seen = (of_prompt < prompt_R[:, None]) & (of_prompt >= past_prompt_R[:, None])
                seen_own = (own <= length_R[:, None]) & (own >= past_own_R[:, None])
                masks[window] = torch.cat([seen, seen_own], dim=1)
        if not self.flash:

            def gathered(pool_MKD: Tensor) -> Tensor:
                own = of_slots(pool_MKD, room)[:rows, :width]
                return torch.cat([of_prompts(pool_MKD, room)[place_R], own], dim=1).transpose(1, 2)

            shown = gathered

        at_R = start_R + length_R
        for states in self.states:
            states.look(at_R, shown)
        return self.run(self.states, token_R, position_R[:, None], masks)[:, -1]


def over_slots(
    room: Room, heads: int, like_NLKD: Tensor, warn: Callable[[str], None]
) -> tuple[Callable[[], OverSlots] | None, Write]:
    """Makes the fastest attention that reads true lengths and works here, for `heads` of queries; and writes states.

    None where there is none: silently where none is for the device or precision, else `warn` is told why.
    """
    device, dtype = like_NLKD.device, like_NLKD.dtype
    if not has_flash(device, dtype):
        return None, write_each
    key_heads, size = like_NLKD.shape[2:]
    shared = heads // key_heads
    why_not = without_triton(device, dtype)
    if why_not is None:
        from dppo_cli.kernels.fused import attention  # which imports Triton

        if attention.supports(shared, size):
            why_not = refused(lambda: attention.difference(device, dtype, key_heads, shared, size), CLOSE)
            if why_not is None:
                return lambda: attention.SplitAttention(room.prompt_positions, room.positions), attention.write
    if why_not:
        warn(WITHOUT_SPLIT.format(why_not))

    def apart() -> float:
        return difference(FlashOverSlots(ROWS, LONGEST, device), device, dtype, key_heads, shared, size)

    why_not = refused(apart, CLOSE)
    if why_not is None:
        longest = max(room.prompt_positions, room.positions)
        return lambda: FlashOverSlots(room.slots, longest, device), write_each
    warn(WITHOUT_FLASH.format(why_not))
    return None, write_each
