"""The one place that runs the base model: whole sequences, prompts, and responses that continue from prompts.

An update runs its samples through a `Forward`. There are three: `SharedPrompts` runs each prompt once, `WholeSequences`
runs prompt and response together, `PackedGroups` (packed_forward.py) runs a prompt and the responses to it in one row;
`choose_forward` (choice.py) says which a model gets.

Shapes: P prompts, L their longest length, C tokens that all begin with, B responses of a micro-batch, R their longest
length, N sampled tokens, H hidden size.
"""

import inspect
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from dppo_cli.kernels.layer_parts import sees_all
from dppo_cli.kernels.segments import Segments
from dppo_cli.policy.policy import Policy
from dppo_cli.types import Batch, PaddedPrompts

CONTEXT_PER_POSITION = 16
"""Positions that are only attended to, as keys and values, count as one that runs: a layer saves about twenty times as
much for one that runs."""
WORTH_SHARING = 32
"""Tokens saved. A forward pass for the common beginning costs about as much as so many more tokens beside others."""


class Forward(Protocol):
    """Runs the samples of one update, in micro-batches.

    `num_positions` counts tokens and padding of what was run so far, `num_tokens` the tokens among them. A response's
    last token counts, although nothing is predicted from it.
    """

    num_positions: int
    num_tokens: int

    def __init__(self, policy: Policy, prompts: Mapping[int, Sequence[int]], budget: int) -> None:
        """`prompts`: token ids by the prompt's number; at most `budget` tokens run at once."""
        ...

    @staticmethod
    def split(samples: Sequence[tuple[int, int, int]], budget: int) -> list[list[int]]:
        """Indices of samples, cut into micro-batches of at most `budget` tokens and padding.

        Of each sample: its prompt's number, its prompt's tokens, its own tokens. One over the budget is alone.
        """
        ...

    def predicting_states(self, batch: Batch) -> Tensor:
        """The final hidden state [N, H] that predicts each sampled token: the one at the position before it."""
        ...

    def backward(self) -> None:
        """Called once, after the backward passes of all micro-batches: the gradient that is still to be carried on."""
        ...


class WholeSequences:
    """Each prompt and response as one sequence. See `Forward`."""

    def __init__(self, policy: Policy, prompts: Mapping[int, Sequence[int]], budget: int) -> None:
        self.policy = policy
        self.num_positions = self.num_tokens = 0

    @staticmethod
    def split(samples: Sequence[tuple[int, int, int]], budget: int) -> list[list[int]]:
        return split_by_tokens([prompt + own for _, prompt, own in samples], [0] * len(samples), budget)

    def predicting_states(self, batch: Batch) -> Tensor:
        ids_BX = batch.whole_ids(self.policy.pad_id)
        self.num_positions += ids_BX.numel()
        self.num_tokens += batch.num_tokens + int(batch.prompts.length_P1[batch.prompt_B].sum())
        start_N = batch.prompts.length_P1[batch.prompt_B[batch.row_N], 0]
        return hidden_states(self.policy, ids_BX)[batch.row_N, start_N + batch.position_N - 1]

    def backward(self) -> None:
        """Nothing is left to do: each micro-batch ran its prompts."""


class SharedPrompts:
    """The final hidden state, keys and values of each prompt; responses continue from them. See `Forward`.

    What the micro-batches' backward passes ask of a prompt adds up here; `backward()` carries the sum on to the
    adapter. The prompts run `budget` tokens at a time and keep only their results, so they run again in `backward()`.
    """

    def __init__(self, policy: Policy, prompts: Mapping[int, Sequence[int]], budget: int) -> None:
        self.policy = policy
        self.row: dict[int, int] = {}  # of each prompt in `states`
        self.num_positions = self.num_tokens = 0
        numbers = list(prompts)
        lengths = [len(prompts[number]) for number in numbers]
        self.width = max(lengths)
        self.runs: list[tuple[Tensor, ...]] = []
        for part in split_by_tokens(lengths, [0] * len(lengths), budget):
            padded = PaddedPrompts.pad([prompts[numbers[i]] for i in part], policy.pad_id, policy.device)
            self.row.update({numbers[i]: len(self.row) + n for n, i in enumerate(part)})
            saved = shared_beginning(policy.model, padded) * (len(part) - 1)
            self.num_positions += padded.ids_PL.numel() - saved
            self.num_tokens += sum(lengths[i] for i in part) - saved
            again = torch.is_grad_enabled()
            self.runs.append(checkpoint(self._run, padded, use_reentrant=False) if again else self._run(padded))
        # The first layers' keys and values need no gradient if there is no adapter before them.
        self.states = [
            torch.cat(column).detach().requires_grad_(column[0].requires_grad)
            for column in zip(*self.runs, strict=True)
        ]

    @staticmethod
    def split(samples: Sequence[tuple[int, int, int]], budget: int) -> list[list[int]]:
        return split_by_tokens([own for *_, own in samples], [prompt for _, prompt, _ in samples], budget)

    def predicting_states(self, batch: Batch) -> Tensor:
        self.num_positions += batch.num_positions
        self.num_tokens += batch.num_tokens
        rows_P = torch.tensor([self.row[number] for number in batch.number_P], device=self.policy.device)
        rows_B = rows_P[batch.prompt_B]
        last_PH, *keys_and_values = self.states
        # Not state[rows_B], whose gradient is added up in an order that changes from run to run.
        hidden_BRH = last_PH.index_select(0, rows_B)[:, None]
        later_BR = batch.response_ids_BR[:, :-1]
        more = later_BR.shape[1]
        if more:
            first = self.width - batch.prompts.ids_PL.shape[1]
            own = [state[:, :, first:].index_select(0, rows_B) for state in keys_and_values]
            cache = DynamicCache(list(zip(own[::2], own[1::2], strict=True)))
            mask_PX = batch.prompts.mask(more)
            mask_BX = None if mask_PX is None else mask_PX[batch.prompt_B]
            position_1R = torch.arange(more, device=self.policy.device)[None]
            positions_BR = batch.prompts.length_P1[batch.prompt_B] + position_1R
            with self.policy.autocast():
                later_BRH = _run_base(self.policy.model, later_BR, positions_BR, mask_BX, cache)
            hidden_BRH = torch.cat([hidden_BRH, later_BRH], dim=1)
        return hidden_BRH[batch.row_N, batch.position_N]

    def backward(self) -> None:
        start = 0
        for run in self.runs:
            rows = slice(start, start + run[0].shape[0])
            start = rows.stop
            # None: keys and values that no response asked for, having one token each.
            asked = [(out, s.grad[rows]) for out, s in zip(run, self.states, strict=True) if s.grad is not None]
            torch.autograd.backward([out for out, _ in asked], [gradient for _, gradient in asked])
        self.runs.clear()
        self.states.clear()

    def _run(self, prompts: PaddedPrompts) -> tuple[Tensor, ...]:
        """[P, H] and each layer's keys and values, [P, heads, L, size]."""
        # Not a cache made from the config: that one drops what a sliding window has left behind, and responses of
        # shorter prompts could not be told apart from the padding. The attention mask keeps to the window.
        cache = DynamicCache()
        with self.policy.autocast():
            last_PH = run_prompts(self.policy.model, prompts, cache)
        left = self.width - prompts.ids_PL.shape[1]
        # A layer of this cache is iterated over as keys, values, and a window that it does not have.
        states = [state for keys, values, *_ in cache for state in (keys, values)]
        return last_PH, *(torch.nn.functional.pad(s, (0, 0, left, 0)) for s in states)


def hidden_states(policy: Policy, ids_BL: Tensor) -> Tensor:
    """Final hidden states [B, L, H] of whole sequences, padded on the right.

    Such padding needs no mask: under causal attention no real token attends to what is on its right.
    """
    with policy.autocast():
        return _run_base(policy.model, ids_BL)


def packed_states(policy: Policy, ids_1S: Tensor, positions_1S: Tensor, segments: Segments) -> Tensor:
    """Final hidden states [S, H] of a row of prompts and responses, by a model that `can_pack` (packed_forward.py)."""
    # transformers would make a mask [S, S] from the positions. One with four dimensions it hands on as it is, and this
    # one is of a type that no attention takes but the one that reads the segments instead.
    no_mask = ids_1S.new_zeros(1, 1, 1, 1)
    with policy.autocast():
        return _run_base(policy.model, ids_1S, positions_1S, no_mask, segments=segments)[0]


def run_prompts(model: PreTrainedModel, prompts: PaddedPrompts, cache: Cache) -> Tensor:
    """Final hidden state [P, H] of each prompt's last token; what all prompts begin with runs once.

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
    # What follows the beginning stays in its columns, on the right; the padding before shorter ones is masked out.
    rest = width - common
    mask = None if mask_PL is None else torch.cat([torch.ones_like(mask_PL[:, :common]), mask_PL[:, :rest]], dim=-1)
    hidden_PH = last_states(model, ids_PL[:, common:], positions_PL[:, :rest] + common, mask, cache)
    if mask_PL is not None:
        _close_gaps(cache, width - prompts.length_P1, common)
    return hidden_PH


def last_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
    """Final hidden state of each row's last token; `ids` and `positions` continue `cache`, `mask` covers all of it."""
    return _run_base(model, ids, positions, mask, cache)[:, -1]


def shared_beginning(model: PreTrainedModel, prompts: PaddedPrompts) -> int:
    """C: how many tokens run once for all prompts, 0 where it is not worth it. At least one token is left of each.

    Padding is then between the beginning and what follows. So it cannot be shared where distance in columns matters (a
    sliding window that is passed, or a model that takes no positions, such as MPT), nor where a layer's state is more
    than keys and values.
    """
    common = min(common_tokens(prompts.token_ids), min(len(ids) for ids in prompts.token_ids) - 1)
    if common * (len(prompts.token_ids) - 1) < WORTH_SHARING:
        return 0
    takes_positions = "position_ids" in inspect.signature(model.base_model.forward).parameters
    return common if takes_positions and sees_all(model, prompts.ids_PL.shape[1] + 1) else 0


def shared_tokens(token_ids: Sequence[Sequence[int]]) -> int:
    """How many tokens run if what all of them begin with runs once."""
    saved = common_tokens(token_ids) * (len(token_ids) - 1)
    return sum(map(len, token_ids)) - (saved if saved >= WORTH_SHARING else 0)


def common_tokens(token_ids: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    columns = zip(*token_ids, strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def split_by_tokens(lengths: Sequence[int], contexts: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences, cut into parts whose padded size stays within `budget` tokens.

    `lengths`: tokens of each that run; `contexts`: tokens before them that are only attended to. Longest first, so
    that sequences of a part are alike in length and little is padded. A sequence longer than the budget is alone.
    """
    parts: list[list[int]] = []
    context = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if parts:
            longest, wider = lengths[parts[-1][0]], max(context, contexts[index])
            if (len(parts[-1]) + 1) * (longest + wider / CONTEXT_PER_POSITION) <= budget:
                parts[-1].append(index)
                context = wider
                continue
        parts.append([index])
        context = contexts[index]
    return parts


def _run_base(
    model: PreTrainedModel,
    ids: Tensor,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
    cache: Cache | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Final hidden states of `ids`, which continue `cache` if there is one."""
    given: dict[str, Any] = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    given["segments"] = segments
    given = {name: value for name, value in given.items() if value is not None}
    output: Any = model.base_model(input_ids=ids, use_cache=cache is not None, **given)
    return output.last_hidden_state  # type: ignore[no-any-return]


def _close_gaps(cache: Cache, gap_P1: Tensor, common: int) -> None:
    """Move the beginning of each prompt to the right, next to what follows; a key depends on its position alone."""
    column_1L = torch.arange(cache.get_seq_length(), device=gap_P1.device)[None]
    from_PL = torch.where(column_1L < gap_P1 + common, (column_1L - gap_P1).clamp(min=0), column_1L)

    def moved(states: Tensor | None) -> Tensor | None:
        if states is None:  # a layer that reads another's
            return None
        return states.gather(-2, from_PL[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))

    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        layer.keys, layer.values = moved(layer.keys), moved(layer.values)
