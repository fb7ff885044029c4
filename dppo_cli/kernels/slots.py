"""Keys and values of sequences in slots of a fixed size, and a decoding step whose shapes and addresses are fixed.

A slot holds one sequence from its first position on, so sequences of different lengths need no padding, and another
sequence can take a slot while the others go on. The host reads nothing: a CUDA graph can replay a step.

Shapes: S slots, C positions of a slot, R rows (the first R slots take part in a step), X positions that a step reads,
K key heads, Q query heads per key head, D head size, H hidden size, N sequences that get a slot, L prompt positions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from dppo_cli.kernels.beside import Beside
from dppo_cli.kernels.flash import CLOSE, FlashOverSlots, difference, has_flash
from dppo_cli.kernels.llama import LlamaStep

FIXED_ROTARY = ("default", "linear", "llama3", "yarn")
"""Rotary frequencies that do not depend on how long the longest sequence is."""
WITHOUT_FLASH = "attention reads more of the cache than is in use, because torch's flash kernel does not work here: {}"


def has_fixed_frequencies(model: PreTrainedModel) -> bool:
    """Whether a key in a slot stays right when its sequence, or another, grows."""
    return getattr(getattr(model.base_model, "rotary_emb", None), "rope_type", None) in FIXED_ROTARY


class SlotStates:
    """Keys and values of one layer, [S, C, K, D], written where `Decoding` says. As `LlamaStep` asks a cache for them.

    They begin as zeros: what is behind a sequence's end has no weight in its attention, but zero times NaN is NaN.
    """

    def __init__(self, slots: int, capacity: int, like_PLKD: Tensor) -> None:
        shape = (slots, capacity, *like_PLKD.shape[2:])
        self.keys, self.values = like_PLKD.new_zeros(shape), like_PLKD.new_zeros(shape)
        self.at_R = torch.empty(0)
        self.width = 0

    def look(self, at_R: Tensor, width: int) -> None:
        """The next `update` writes to `at_R`, counted through all slots, and shows the first `width` of each."""
        self.at_R, self.width = at_R, width

    def update(self, keys_RK1D: Tensor, values_RK1D: Tensor) -> tuple[Tensor, Tensor]:
        """[R, K, X, D] each, with the new ones among them."""
        rows = len(self.at_R)
        for pool, new in ((self.keys, keys_RK1D), (self.values, values_RK1D)):
            pool.flatten(0, 1).index_copy_(0, self.at_R, new.squeeze(2))
        return (
            self.keys[:rows, : self.width].transpose(1, 2),
            self.values[:rows, : self.width].transpose(1, 2),
        )

    def put(self, slot_N: Tensor, keys_NLKD: Tensor, values_NLKD: Tensor) -> None:
        """A prompt's states from a slot's first position on."""
        for pool, new in ((self.keys, keys_NLKD), (self.values, values_NLKD)):
            pool[:, : new.shape[1]].index_copy_(0, slot_N, new)

    def move(self, from_M: Tensor, to_M: Tensor, width: int) -> None:
        for pool in (self.keys, self.values):
            pool[to_M, :width] = pool[from_M, :width]


class Decoding:
    """`step` for one token of each of the first R slots. See `LlamaStep` for the models that it computes.

    `like`: keys of any prompt [P, L, K, D], for each layer; their precision is that in which the model computes.
    `warn` is told if the faster attention (`FlashOverSlots`) should work here and does not.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        slots: int,
        capacity: int,
        like: Sequence[Tensor],
        warn: Callable[[str], None],
    ) -> None:
        self.slots, self.capacity = slots, capacity
        device, dtype = like[0].device, like[0].dtype
        self.states = [SlotStates(slots, capacity, states) for states in like]
        self.beside = Beside(dtype)
        why_not = _without_flash(model, like[0])
        if why_not:
            warn(WITHOUT_FLASH.format(why_not))
        self.flash = FlashOverSlots(slots, capacity, device) if why_not is None else None
        self.run = LlamaStep(model, self.beside, self.flash or scaled_dot_product_attention)
        self.start_S = torch.arange(slots, device=device) * capacity
        self.position_C = torch.arange(capacity, device=device)

    def step(self, token_R: Tensor, length_R: Tensor, width: int) -> Tensor:
        """Final hidden states [R, H] of tokens int64 [R], each at the position after its slot's `length_R` positions.

        `width`, X: more than every length; the work grows with it, unless `flash` reads true lengths.
        """
        at_R = self.start_S[: len(token_R)] + length_R
        mask_RX = None
        if self.flash is not None:
            width = self.capacity
            self.flash.look(length_R + 1)
        else:
            mask_RX = self.position_C[:width] <= length_R[:, None]
        for states in self.states:
            states.look(at_R, width)
        return self.run(self.states, token_R, length_R[:, None], mask_RX)[:, -1]


def _without_flash(model: PreTrainedModel, like_PLKD: Tensor) -> str | None:
    """Why not: empty where it is not for this device or precision."""
    device, dtype = like_PLKD.device, like_PLKD.dtype
    if not has_flash(device, dtype):
        return ""
    key_heads, size = like_PLKD.shape[2:]
    try:
        apart = difference(device, dtype, key_heads, model.config.num_attention_heads // key_heads, size)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return next(iter(str(error).splitlines()), type(error).__name__)
    return None if apart <= CLOSE else f"its results are {apart:.2g} off"
