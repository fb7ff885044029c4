"""Running each prompt of an update once, however many responses it has and however they are cut into micro-batches.

Shapes: P distinct prompts, L their longest length, B responses of a micro-batch, R their longest length,
N sampled tokens, H hidden size.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dppo_cli.policy.policy import Policy
from dppo_cli.policy.prefill import run_prompts, shared_beginning
from dppo_cli.types import Batch, Prompts

CONTEXT_PER_PLACE = 16
"""Places that are only seen, as keys and values, count as one that is run: a layer saves some twenty times as much."""


class SharedPrompts:
    """The final hidden state, keys and values of distinct prompts; responses continue from them, with gradient.

    What the micro-batches' backward passes ask of a prompt adds up here; `backward()` carries the sum on to the
    adapter. The prompts run `budget` tokens at a time and keep only their results, so they run again in `backward()`.

    Where responses cannot continue from keys and values (see `can_share`) every whole sequence runs instead.
    """

    def __init__(self, policy: Policy, token_ids: Iterable[tuple[int, ...]], budget: int) -> None:
        self.policy = policy
        self.shares = can_share(policy)
        self.row: dict[tuple[int, ...], int] = {}
        self.places = self.tokens = 0
        distinct = list(dict.fromkeys(token_ids))
        lengths = [len(ids) for ids in distinct]
        self.width = max(lengths)
        self.runs: list[tuple[Tensor, ...]] = []
        for part in split_by_tokens(lengths, [0] * len(lengths), budget):
            prompts = Prompts.pad([distinct[i] for i in part], policy.pad_id, policy.device)
            self.row.update({ids: len(self.row) + i for i, ids in enumerate(prompts.token_ids)})
            saved = shared_beginning(policy.model, prompts) * (len(part) - 1) if self.shares else 0
            self.places += prompts.ids_PL.numel() - saved
            self.tokens += sum(lengths[i] for i in part) - saved
            if self.shares:
                again = torch.is_grad_enabled()
                self.runs.append(checkpoint(self._run, prompts, use_reentrant=False) if again else self._run(prompts))
        # The first layers' keys and values need no gradient if no adapter stands before them.
        self.states = [
            torch.cat(column).detach().requires_grad_(column[0].requires_grad)
            for column in zip(*self.runs, strict=True)
        ]

    def predicting_states(self, batch: Batch) -> Tensor:
        """The final hidden state [N, H] from which each sampled token is predicted, one place to the left of it."""
        if not self.shares:
            start_N = batch.prompts.length_P1[batch.prompt_B[batch.row_N], 0]
            whole_BLH = self.policy.hidden_states(batch.whole_ids(self.policy.pad_id))
            return whole_BLH[batch.row_N, start_N + batch.place_N - 1]
        rows_P = torch.tensor([self.row[ids] for ids in batch.prompts.token_ids], device=self.policy.device)
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
            place_1R = torch.arange(more, device=self.policy.device)[None]
            with self.policy.autocast():
                later_BRH = self.policy.model.base_model(
                    input_ids=later_BR,
                    attention_mask=None if mask_PX is None else mask_PX[batch.prompt_B],
                    position_ids=batch.prompts.length_P1[batch.prompt_B] + place_1R,
                    past_key_values=cache,
                ).last_hidden_state
            hidden_BRH = torch.cat([hidden_BRH, later_BRH], dim=1)
        return hidden_BRH[batch.row_N, batch.place_N]

    def backward(self) -> None:
        """Add the adapter's gradient through the prompts, once all micro-batches have run backward. Call it once."""
        start = 0
        for run in self.runs:
            rows = slice(start, start + run[0].shape[0])
            start = rows.stop
            # None: keys and values that no response asked for, having one token each.
            asked = [(out, s.grad[rows]) for out, s in zip(run, self.states, strict=True) if s.grad is not None]
            torch.autograd.backward([out for out, _ in asked], [gradient for _, gradient in asked])
        self.runs.clear()
        self.states.clear()

    def _run(self, prompts: Prompts) -> tuple[Tensor, ...]:
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


def can_share(policy: Policy) -> bool:
    """Whether a response can continue from its prompt's keys and values in training.

    transformers keeps none under gradient checkpointing, and layers other than attention have none.
    """
    attention = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = DynamicCache(config=policy.model.config).layers
    return not policy.model.is_activation_checkpointing and all(type(layer) in attention for layer in layers)


def split_by_tokens(lengths: Sequence[int], contexts: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of sequences, cut into parts whose padded size stays within `budget` tokens.

    `lengths`: tokens of each that run; `contexts`: tokens before them that are only seen. Longest first, so neighbours
    are alike in length and little is padded. A sequence longer than the budget is alone.
    """
    parts: list[list[int]] = []
    context = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if parts:
            longest, wider = lengths[parts[-1][0]], max(context, contexts[index])
            if (len(parts[-1]) + 1) * (longest + wider / CONTEXT_PER_PLACE) <= budget:
                parts[-1].append(index)
                context = wider
                continue
        parts.append([index])
        context = contexts[index]
    return parts
