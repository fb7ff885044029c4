"""Running prompts, and what all of them begin with only once: a system message, instructions, examples.

Shapes: P prompts, L their longest length, C tokens that all begin with, H hidden size.
"""

import inspect
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dppo_cli.types import Prompts

WORTH_IT = 32
"""Tokens saved. A pass of its own for the beginning costs about as much as running so many more beside others."""


def common_tokens(token_ids: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    columns = zip(*token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def keeps_every_place(model: PreTrainedModel) -> bool:
    """Whether each layer keeps the keys and values of all places, and nothing else: no window, no other state."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=model.config).layers)


def shared_beginning(model: PreTrainedModel, prompts: Prompts) -> int:
    """C, 0 where it is not worth it: how many tokens run once for all prompts. At least one is left of each.

    Padding then stands between the beginning and the rest. So not where distance is measured in places: by a sliding
    window, or by a model that takes no positions (MPT). Nor where a layer's state is more than keys and values.
    """
    common = min(common_tokens(prompts.token_ids), min(len(ids) for ids in prompts.token_ids) - 1)
    if common * (len(prompts.token_ids) - 1) < WORTH_IT:
        return 0
    takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    return common if keeps_every_place(model) and takes_positions else 0


def run_prompts(model: PreTrainedModel, prompts: Prompts, cache: Cache) -> Tensor:
    """Final hidden state [P, H] of each prompt's last token.

    `cache`, empty before, holds their keys and values then, [P, heads, L, size], padded on the left with anything.
    """
    common = shared_beginning(model, prompts)
    ids_PL, positions_PL, mask_PL = prompts.ids_PL, prompts.positions(), prompts.mask(0)
    if not common:
        return last_states(model, ids_PL, positions_PL, mask_PL, cache)
    count, width = ids_PL.shape
    longest = next(p for p, ids in enumerate(prompts.token_ids) if len(ids) == width)
    last_states(model, ids_PL[longest, None, :common], positions_PL[longest, None, :common], None, cache)
    cache.batch_repeat_interleave(count)
    # The rest stands where it stood, on the right. Before it comes what fills up shorter rests: masked out.
    rest = width - common
    mask = None if mask_PL is None else torch.cat([torch.ones_like(mask_PL[:, :common]), mask_PL[:, :rest]], dim=-1)
    hidden_PH = last_states(model, ids_PL[:, common:], positions_PL[:, :rest] + common, mask, cache)
    if mask_PL is not None:
        _close_gaps(cache, width - prompts.length_P1, common)
    return hidden_PH


def last_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
    """Final hidden state of each row's last token; `ids` and `positions` continue `cache`, `mask` is of all places."""
    output = model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return output.last_hidden_state[:, -1]  # type: ignore[no-any-return]


def _close_gaps(cache: Cache, gap_P1: Tensor, common: int) -> None:
    """Move the beginning of each prompt to the right, next to its rest; keys know their position, not their place."""
    place_1L = torch.arange(cache.get_seq_length(), device=gap_P1.device)[None]
    from_PL = torch.where(place_1L < gap_P1 + common, (place_1L - gap_P1).clamp(min=0), place_1L)

    def moved(states: Tensor | None) -> Tensor | None:
        if states is None:  # a layer that reads another's
            return None
        return states.gather(-2, from_PL[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))

    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        layer.keys, layer.values = moved(layer.keys), moved(layer.values)
