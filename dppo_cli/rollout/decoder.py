"""One wave of sequences through a transformers model, a token at a time.

Shapes: P prompts, G samples per prompt, B = P x G sequences, A of them still being written, L padded prompt length,
H hidden size.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dppo_cli.types import Prompt

SHRINK_AT = 0.875
"""Finished sequences leave the batch when at most this share of it is still being written: leaving copies the cache."""


class Decoder:
    """`prefill()` once, then `step()` per token; both give final hidden states of the sequences still being written."""

    def __init__(
        self, model: PreTrainedModel, prompts: Sequence[Prompt], group: int, max_new_tokens: int, pad_id: int
    ) -> None:
        device = model.device
        self.model, self.group, self.pad_id = model, group, pad_id
        lengths = [len(p.token_ids) for p in prompts]
        longest = max(lengths)
        ids = [[pad_id] * (longest - n) + list(p.token_ids) for p, n in zip(prompts, lengths, strict=True)]
        self.prompt_PL = torch.tensor(ids, device=device)
        self.length_B1 = torch.tensor(lengths, device=device)[:, None]
        # Without padding no mask is needed, and attention is faster without one.
        self.mask_BL = None
        if min(lengths) < longest:
            place_1L = torch.arange(longest + max_new_tokens, device=device)[None]
            self.mask_BL = (place_1L >= longest - self.length_B1).long()
        self.cache = DynamicCache(config=model.config)
        for i, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[i] = PreallocatedLayer(longest + max_new_tokens)
        self.slot_A = torch.arange(len(prompts) * group, device=device)
        self.written = 0

    def prefill(self) -> Tensor:
        """Run each distinct prompt once; [B, H], prompt-major."""
        width = self.prompt_PL.shape[1]
        position_PL = (torch.arange(width, device=self.prompt_PL.device) - (width - self.length_B1)).clamp(min=0)
        hidden_PH = self._forward(self.prompt_PL, position_PL)
        self.cache.batch_repeat_interleave(self.group)
        self.length_B1 = self.length_B1.repeat_interleave(self.group, dim=0)
        if self.mask_BL is not None:
            self.mask_BL = self.mask_BL.repeat_interleave(self.group, dim=0)
        return hidden_PH.repeat_interleave(self.group, dim=0)

    def step(self, token_A: Tensor, rows_A: Tensor) -> Tensor:
        """Append `token_A` to the sequences `rows_A` of those that the last call gave; the others have finished."""
        self.slot_A = self.slot_A[rows_A]
        if len(self.slot_A) <= SHRINK_AT * self.length_B1.shape[0]:
            self.cache.batch_select_indices(self.slot_A)
            self.length_B1 = self.length_B1[self.slot_A]
            self.mask_BL = None if self.mask_BL is None else self.mask_BL[self.slot_A]
            self.slot_A = torch.arange(len(self.slot_A), device=token_A.device)
        token_B1 = torch.full_like(self.length_B1, self.pad_id)
        token_B1[self.slot_A, 0] = token_A
        position_B1 = self.length_B1 + self.written
        self.written += 1
        return self._forward(token_B1, position_B1)[self.slot_A]

    def _forward(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        mask = None if self.mask_BL is None else self.mask_BL[:, : self.prompt_PL.shape[1] + self.written]
        output = self.model.base_model(
            input_ids=token_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, -1]  # type: ignore[no-any-return]


class PreallocatedLayer(DynamicLayer):
    """Keys and values in buffers with room for `capacity` places: a step writes one place instead of copying all.

    A subclass because transformers' `Cache` asks its layers for this interface.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity = capacity
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        assert self.keys is not None and self.values is not None
        start, end = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if self.buffers is None:
            self.buffers = self._with_room(self.keys), self._with_room(self.values)
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = new
        self.keys, self.values = (b[:, :, :end] for b in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.buffers = None

    def _with_room(self, states: Tensor) -> Tensor:
        batch, heads, length, size = states.shape
        buffer = states.new_empty(batch, heads, self.capacity, size)
        buffer[:, :, :length] = states
        return buffer
