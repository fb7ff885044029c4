"""An update's samples in one row of tokens for each micro-batch, without padding: see `PackedGroups`.

Shapes: P prompts of a micro-batch, B responses, R tokens of all responses that run, S tokens of the row, N sampled
tokens, H hidden size, Q query heads, K key heads, D head size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from dppo_cli.kernels.layer_parts import is_known, windows_of
from dppo_cli.kernels.segments import Segments, attend
from dppo_cli.policy.forward import packed_states
from dppo_cli.policy.policy import Policy
from dppo_cli.types import Batch


class PackedGroups:
    """Prompts and their responses in one row of tokens; a prompt runs once in each micro-batch. See `Forward`.

    The gradient of a prompt is part of its micro-batch's. So there is nothing to run again, and layers may recompute.
    """

    def __init__(self, policy: Policy, prompts: Mapping[int, Sequence[int]], budget: int) -> None:
        self.policy = policy
        self.num_positions = self.num_tokens = 0

    @staticmethod
    def split(samples: Sequence[tuple[int, int, int]], budget: int) -> list[list[int]]:
        """The responses to a prompt together, unless they are more than the budget."""
        groups: dict[int, list[int]] = {}
        for index, (prompt, _, _) in enumerate(samples):
            groups.setdefault(prompt, []).append(index)
        parts: list[list[int]] = []
        room = 0
        for indices in groups.values():
            prompt_tokens = samples[indices[0]][1]
            whole = prompt_tokens + sum(samples[i][2] for i in indices)
            if parts and whole <= room:
                parts[-1] += indices
                room -= whole
                continue
            room = 0
            for i in indices:
                if samples[i][2] > room:
                    parts.append([])
                    room = budget - prompt_tokens
                parts[-1].append(i)
                room -= samples[i][2]
        return parts

    def predicting_states(self, batch: Batch) -> Tensor:
        row = Row(batch)
        self.num_positions += row.num_tokens
        self.num_tokens += row.num_tokens
        hidden_SH = packed_states(self.policy, row.ids_1S, row.positions_1S, row.segments)
        first = row.segments.prompt_tokens
        of_prompts, of_responses = hidden_SH.split([first, len(hidden_SH) - first])
        # A response's first token is predicted from its prompt. Not of_prompts[rows], whose gradient is added up in an
        # order that may change from run to run.
        ends = of_prompts.index_select(0, row.last_P).split(1)
        copies = [end.expand(count, -1) for end, count in zip(ends, row.answers, strict=True)]
        return torch.cat([*copies, of_responses]).index_select(0, row.state_N)

    def backward(self) -> None:
        """Nothing is left to do: each micro-batch ran its prompts."""


class Row:
    """A batch as one row: all prompts, then the responses to the first, to the second, and so on.

    No token is predicted from a response's last one, so it does not run.
    """

    def __init__(self, batch: Batch) -> None:
        device = batch.token_N.device
        of_B, length_B = batch.prompt_B.tolist(), batch.length_B.tolist()
        # Prompts whose responses have one token each are last; see `Segments`.
        members = [[b for b, p in enumerate(of_B) if p == prompt] for prompt in range(len(batch.number_P))]
        members_of = sorted(enumerate(members), key=lambda of: not any(length_B[b] > 1 for b in of[1]))
        prompts = [batch.prompts.token_ids[p] for p, _ in members_of]
        order = [b for _, of in members_of for b in of]
        self.segments = Segments(
            tuple(len(ids) for ids in prompts),
            tuple(tuple(length_B[b] - 1 for b in of if length_B[b] > 1) for _, of in members_of),
        )
        self.answers = [len(of) for _, of in members_of]  # responses to each prompt
        self.num_tokens = self.segments.prompt_tokens + sum(length_B)
        ends = torch.tensor(self.segments.prompts).cumsum(0)
        self.last_P = (ends - 1).to(device)
        # Where each response's first state is among those that predict its second token and so on, less one.
        running = torch.tensor([length_B[b] - 1 for b in order])
        later = torch.empty_like(running)
        later[torch.tensor(order)] = running.cumsum(0) - running + len(order) - 1
        first = torch.empty_like(running)
        first[torch.tensor(order)] = torch.arange(len(order))
        row_N = batch.row_N
        self.state_N = torch.where(
            batch.position_N == 0, first.to(device)[row_N], later.to(device)[row_N] + batch.position_N
        )
        ids = [torch.tensor([i for own in prompts for i in own], device=device)]
        ids += [batch.response_ids_BR[b, : length_B[b] - 1] for b in order]
        self.ids_1S = torch.cat(ids)[None]
        starts = [(0, len(own)) for own in prompts]
        starts += [(len(own), length_B[b] - 1) for own, (_, of) in zip(prompts, members_of, strict=True) for b in of]
        self.positions_1S = torch.cat([torch.arange(start, start + n) for start, n in starts]).to(device)[None]


def can_pack(model: PreTrainedModel) -> bool:
    """Whether the model computes the same from a row of segments: its layers are known."""
    return is_known(model) and windows_of(model) is not None


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    segments: Segments | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    kernel: Any = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' own `sdpa`, but for a row of segments: [1, Q or K, S, D] -> [1, S, Q, D]. `kernel`: see attend."""
    if segments is None:
        more["sliding_window"] = sliding_window
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    assert scaling is not None and query.shape[0] == 1 and not more.get("dropout")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, segments, scaling, kernel, sliding_window)[None], None


# In place of transformers' own, not under another name for the time of a pass: layers that recompute in the backward
# pass look it up then, and find the segments among the arguments that were kept for them.
AttentionInterface.register("sdpa", attention)
