"""What an update takes, and what it leaves behind."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dppo_cli.types.group import Completion
from dppo_cli.types.report import PolicyReport


@dataclass(frozen=True)
class PaddedPrompts:
    """P prompts padded on the left, so that the responses that continue them start in the same column."""

    token_ids: tuple[tuple[int, ...], ...]  # the same, unpadded, on the host
    ids_PL: Tensor  # int64
    length_P1: Tensor  # int64, tokens of each

    @staticmethod
    def pad(token_ids: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> "PaddedPrompts":
        longest = max(len(ids) for ids in token_ids)
        rows = [[pad_id] * (longest - len(ids)) + list(ids) for ids in token_ids]
        lengths = [[len(ids)] for ids in token_ids]
        unpadded = tuple(tuple(ids) for ids in token_ids)
        return PaddedPrompts(unpadded, torch.tensor(rows, device=device), torch.tensor(lengths, device=device))

    def positions(self) -> Tensor:
        """int64 [P, L]; the first token of each prompt has position 0."""
        width = self.ids_PL.shape[1]
        return (torch.arange(width, device=self.ids_PL.device) - (width - self.length_P1)).clamp(min=0)

    def mask(self, more: int) -> Tensor | None:
        """Attention mask int64 [P, L + more] of the prompts and `more` columns after them: 0 on padding.

        None where there is no padding: attention needs no mask then, and is faster without one.
        """
        width = self.ids_PL.shape[1]
        if all(len(ids) == width for ids in self.token_ids):
            return None
        column_1X = torch.arange(width + more, device=self.ids_PL.device)[None]
        return (column_1X >= width - self.length_P1).long()


@dataclass(frozen=True)
class Sample:
    """A completion as the update sees it. `prompt`: the number of its prompt among those of the update."""

    prompt: int
    completion: Completion
    advantage: float
    anchor: PolicyReport  # of the policy that the trust region is centred on
    kept: bool = False  # see `Group`


@dataclass(frozen=True)
class Batch:
    """P prompts once each, B responses to them, and the N sampled tokens one after the other.

    Example: of the responses [5, 6] and [9], with all tokens sampled, `response_ids_BR` is [[5, 6], [9, pad]],
    `row_N` [0, 0, 1], `position_N` [0, 1, 0] and `token_N` [5, 6, 9].
    """

    prompts: PaddedPrompts
    number_P: tuple[int, ...]  # each prompt's number among those of the update
    prompt_B: Tensor  # int64, which of the P prompts a response belongs to
    response_ids_BR: Tensor  # int64, padded on the right
    length_B: Tensor  # int64, tokens of each response
    row_N: Tensor  # int64, the response that a token is part of
    position_N: Tensor  # int64, its position there; the response's first token has position 0
    token_N: Tensor  # int64
    advantage_N: Tensor  # float32
    mu: PolicyReport
    anchor: PolicyReport

    def __post_init__(self) -> None:
        n = self.token_N.shape
        assert self.response_ids_BR.dtype == self.token_N.dtype == torch.int64
        assert self.prompt_B.shape == self.length_B.shape == self.response_ids_BR.shape[:1]
        assert self.row_N.shape == self.position_N.shape == self.advantage_N.shape == n
        assert self.mu.logp_N.shape == self.anchor.logp_N.shape == n

    @property
    def num_positions(self) -> int:
        """Tokens and padding of the responses."""
        return self.response_ids_BR.numel()

    @property
    def num_tokens(self) -> int:
        """Tokens of the responses."""
        return int(self.length_B.sum())

    def whole_ids(self, pad_id: int) -> Tensor:
        """Each prompt and response as one sequence, int64 [B, L + R], padded on the right."""
        prompt_ids = [torch.tensor(ids, device=self.token_N.device) for ids in self.prompts.token_ids]
        responses = zip(self.prompt_B.tolist(), self.response_ids_BR, self.length_B.tolist(), strict=True)
        whole = [torch.cat([prompt_ids[p], ids_R[:n]]) for p, ids_R, n in responses]
        return torch.nn.utils.rnn.pad_sequence(whole, batch_first=True, padding_value=pad_id)

    @staticmethod
    def pack(samples: Sequence[Sample], prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> "Batch":
        """Lay out `samples` in their order. `prompts`: token ids of the update's prompts, by their number."""
        column = {number: p for p, number in enumerate(dict.fromkeys(s.prompt for s in samples))}
        lengths = [s.completion.token_ids_T.shape[0] for s in samples]
        response_ids_BR = torch.full((len(samples), max(lengths)), pad_id)
        rows, positions, advantages = [], [], []
        for b, sample in enumerate(samples):
            response_ids_BR[b, : lengths[b]] = sample.completion.token_ids_T
            positions.append(sample.completion.sampled_T.nonzero().squeeze(-1))
            rows.append(torch.full_like(positions[-1], b))
            advantages.append(torch.full(positions[-1].shape, sample.advantage))
        row_N, position_N = torch.cat(rows), torch.cat(positions)
        return Batch(
            prompts=PaddedPrompts.pad([prompts[number] for number in column], pad_id, device),
            number_P=tuple(column),
            prompt_B=torch.tensor([column[s.prompt] for s in samples], device=device),
            response_ids_BR=response_ids_BR.to(device),
            length_B=torch.tensor(lengths, device=device),
            row_N=row_N.to(device),
            position_N=position_N.to(device),
            token_N=response_ids_BR[row_N, position_N].to(device),
            advantage_N=torch.cat(advantages).to(device),
            mu=PolicyReport.cat([s.completion.mu for s in samples]).to(device),
            anchor=PolicyReport.cat([s.anchor for s in samples]).to(device),
        )


@dataclass(frozen=True)
class TokenStats:
    """The sampled tokens of an update as the loss saw them, on the CPU, [N] each; float32 unless said otherwise."""

    token_N: Tensor  # int64
    mu_N: Tensor
    pi_N: Tensor
    log_ratio_N: Tensor  # log pi/mu
    divergence_N: Tensor
    advantage_N: Tensor
    keep_N: Tensor  # bool, kept by the objective's mask
    entropy_N: Tensor  # nats
    reference_kl_N: Tensor  # log pi/ref, nats; 0 without a reference term
    filtered_N: Tensor  # bool, dropped by the off-policy filter
    undecided_N: Tensor | None  # bool, whether the other bound of D decides otherwise; None where it cannot

    def __getitem__(self, rows: slice) -> "TokenStats":
        """Those of some of the tokens."""
        return TokenStats.map(lambda parts: parts[0][rows], [self])

    @staticmethod
    def cat(parts: Sequence["TokenStats"]) -> "TokenStats":
        return TokenStats.map(torch.cat, parts)

    @staticmethod
    def map(change: Callable[[list[Tensor]], Tensor], parts: Sequence["TokenStats"]) -> "TokenStats":
        """Each column made of that column of all `parts`."""
        columns: list[list[Any]] = [[getattr(part, f.name) for part in parts] for f in fields(TokenStats)]
        changed: list[Any] = [None if column[0] is None else change(column) for column in columns]
        return TokenStats(*changed)


@dataclass(frozen=True)
class SampleStats:
    """What an update saw of one completion.

    Example: of two sampled tokens, with K = 3 reported: `tokens` has columns [2], `topk_logp_pi_NK` is [2, 3].
    """

    completion: Completion
    tokens: TokenStats
    topk_logp_pi_NK: Tensor | None  # float32 on the CPU, log pi of mu's K most likely tokens; None: mu has no such list
