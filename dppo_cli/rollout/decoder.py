"""One sub-batch of sequences through a transformers model, a token at a time.

Shapes: P prompts, G samples per prompt, B = P x G sequences, A of them still being written, X positions of prompt
and response, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dppo_cli.kernels.layer_parts import is_known, sees_all
from dppo_cli.kernels.token_step import TokenStep
from dppo_cli.policy.forward import last_states, run_prompts
from dppo_cli.rollout.frequencies import check_length
from dppo_cli.types import PaddedPrompts, Prompt


class Decoder:
    """`prefill()` once, then `step()` per token; both give final hidden states of the sequences still being written.

    A step does not wait for the device. Two families do in transformers itself, to see whether there is padding: GPT-2,
    and models with a sliding window whose prompts differ in length. Raises ModelError for responses whose log-probs
    could not be those of training.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Prompt], group: int, max_new_tokens: int, pad_id: int
    ) -> None:
        self.model, self.group = model, group
        self.prompts = PaddedPrompts.pad([p.token_ids for p in prompts], pad_id, model.device)
        self.width = self.prompts.ids_PL.shape[1]
        self.capacity = self.width + max_new_tokens
        check_length(model, self.width, max_new_tokens)
        self.length_B1 = self.prompts.length_P1
        self.mask_BX = self.prompts.mask(max_new_tokens)
        # A window that shows all positions is none.
        whole = sees_all(model, self.capacity)
        self.cache = DynamicCache() if whole else DynamicCache(config=model.config)
        self.short_cut = TokenStep(model) if whole and is_known(model) else None
        self.written = 0

    def prefill(self) -> Tensor:
        """Run each distinct prompt once; [B, H], prompt-major."""
        hidden_PH = run_prompts(self.model, self.prompts, self.cache)
        for i, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                padded = self.mask_BX is not None
                self.cache.layers[i] = PreallocatedLayer(layer, self.group, self.capacity, padded)
            else:
                layer.batch_repeat_interleave(self.group)  # type: ignore[union-attr]
        self.length_B1 = self.length_B1.repeat_interleave(self.group, dim=0)
        if self.mask_BX is not None:
            self.mask_BX = self.mask_BX.repeat_interleave(self.group, dim=0)
        return hidden_PH.repeat_interleave(self.group, dim=0)

    def keep(self, rows: "Rows") -> None:
        """Drop the sequences that have finished."""
        for layer in self.cache.layers:
            if isinstance(layer, PreallocatedLayer):
                layer.keep(rows)
            else:
                layer.batch_select_indices(rows.kept_A)  # type: ignore[union-attr]
        self.length_B1 = self.length_B1[rows.kept_A]
        self.mask_BX = None if self.mask_BX is None else self.mask_BX[rows.kept_A]

    def step(self, token_A: Tensor) -> Tensor:
        """Append a token to each sequence; [A, H]."""
        position_A1 = self.length_B1 + self.written
        self.written += 1
        mask_AX = None if self.mask_BX is None else self.mask_BX[:, : self.width + self.written]
        if self.short_cut is not None:
            masks: dict[int | None, Tensor] = {} if mask_AX is None else {None: mask_AX}
            return self.short_cut(self.cache.layers, token_A, position_A1, masks)[:, -1]
        return last_states(self.model, token_A[:, None], position_A1, mask_AX, self.cache)


@dataclass(frozen=True)
class Rows:
    """The rows that are kept: new row i is old row `kept_A[i]`. Only the rows `to_M` have moved, from `from_M`."""

    kept_A: Tensor
    to_M: Tensor
    from_M: Tensor


def compact(writing_A: Tensor, device: torch.device) -> Rows:
    """The rows that are True in `writing_A`, bool [A] on the CPU, in an order that lets most of them stay in place.

    Rows from the end fill the gaps: for each sequence that leaves, the cache of one other is copied, not of all.
    """
    count = int(writing_A.sum())
    to_M = (~writing_A[:count]).nonzero().squeeze(-1)
    from_M = writing_A[count:].nonzero().squeeze(-1) + count
    kept_A = torch.arange(count)
    kept_A[to_M] = from_M
    return Rows(kept_A.to(device), to_M.to(device), from_M.to(device))


class PreallocatedLayer(DynamicLayer):
    """Keys and values in buffers with room for `capacity` positions: a step writes one instead of copying all.

    A subclass because transformers' `Cache` asks its layers for this interface. Begins with each row of `prompts`,
    `repeats` times; rows leave by `keep` alone.
    """

    def __init__(self, prompts: DynamicLayer, repeats: int, capacity: int, padded: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor
        self.values: Tensor
        assert prompts.keys is not None and prompts.values is not None
        self.lazy_initialization(prompts.keys, prompts.values)
        # transformers takes it as: do not look, at every token, whether the mask is all ones. On a GPU it would wait.
        self.is_compileable = padded
        self.buffers = tuple(_with_room(states, repeats, capacity) for states in (prompts.keys, prompts.values))
        self._use(len(prompts.keys) * repeats)
        self._show(prompts.keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        start, more = self.keys.shape[-2], key_states.shape[-2]
        # narrow: at every layer of every token, slices in brackets take twice as long as what they do.
        for rows, new in zip(self.rows, (key_states, value_states), strict=True):
            rows.narrow(-2, start, more).copy_(new)
        self._show(start + more)
        return self.keys, self.values

    def keep(self, rows: Rows) -> None:
        """Rows that stay where they are cost nothing."""
        length = self.keys.shape[-2]
        for buffer in self.buffers:
            buffer[rows.to_M, :, :length] = buffer[rows.from_M, :, :length]
        self._use(len(rows.kept_A))
        self._show(length)

    def _use(self, count: int) -> None:
        self.rows = [buffer[:count] for buffer in self.buffers]

    def _show(self, length: int) -> None:
        self.keys, self.values = (rows.narrow(-2, 0, length) for rows in self.rows)


def _with_room(states: Tensor, repeats: int, capacity: int) -> Tensor:
    """[P, heads, L, size] -> [P x repeats, heads, capacity, size]."""
    batch, heads, length, size = states.shape
    buffer = states.new_empty(batch, repeats, heads, capacity, size)
    buffer[..., :length, :] = states[:, None]
    return buffer.flatten(0, 1)
