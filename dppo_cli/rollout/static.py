"""The sequences that are being written, a slot each, with all that a step changes in tensors that stay where they are.

A step samples a token from each slot's hidden state, records it, and runs it through the model. Which tokens these are
does not depend on the slots: a slot has its own step and uniform numbers, and knows the place of its prompt. Sequences
that have ended run on, for nothing, until the host has seen that they have: they write where nobody reads.

Shapes: S slots, R rows (the first R slots take part in a step), T positions of a slot, P prompts, L prompt positions, H
hidden size, V vocabulary, N sequences that get a slot, E tokens that end a response.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from dppo_cli.config.sections import Sampling
from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.slots import Decoding, Room
from dppo_cli.policy.forward import run_prompts
from dppo_cli.policy.head import masses
from dppo_cli.rollout.copies import Sampler
from dppo_cli.rollout.record import told
from dppo_cli.rollout.sampling import draw, truncate
from dppo_cli.types import PaddedPrompts, Prompt


@dataclass(frozen=True)
class Prefilled:
    """P prompts that have run: each layer's keys and values [P, L, K, D], from each prompt's first position on."""

    states: list[tuple[Tensor, Tensor]]
    hidden_PH: Tensor  # of their last tokens
    lengths: tuple[int, ...]


def prefill(sampler: Sampler, prompts: Sequence[Prompt], pad_id: int, device: torch.device) -> Prefilled:
    """Run each prompt once, as the plain path does."""
    on_host = PaddedPrompts.pad([prompt.token_ids for prompt in prompts], pad_id, torch.device("cpu"))
    padded = PaddedPrompts(on_host.token_ids, sent(on_host.ids_PL, device), sent(on_host.length_P1, device))
    cache = DynamicCache()  # which keeps all positions, also of layers with a window
    hidden_PH = run_prompts(sampler.model, padded, cache)
    width = padded.ids_PL.shape[1]
    lengths = tuple(len(ids) for ids in padded.token_ids)
    # The padding is on the left there; behind a prompt's end anything may be.
    column_PL = (torch.arange(width, device=device) + width - padded.length_P1).clamp(max=width - 1)

    def from_first(states_PKLD: Tensor) -> Tensor:
        states_PLKD = states_PKLD.transpose(1, 2)
        if min(lengths) == width:
            return states_PLKD
        return states_PLKD.gather(1, column_PL[..., None, None].expand(states_PLKD.shape))

    # A layer of the cache is iterated over as keys, values, and a window that it does not have.
    states = [(from_first(keys), from_first(values)) for keys, values, *_ in cache]
    return Prefilled(states, hidden_PH, lengths)


class StaticSequences:
    """`put_prompts` gives prompts a place, `put` their samples a slot; `step` writes a token of each; `ends` says which
    have ended.

    `prefilled`: any prompts, whose states tell the shapes and precision of the model's. Memory: `room` for keys and
    values, S rows of T + 1 recorded tokens for each kind of record that was asked for, and one step's logits.
    """

    def __init__(
        self, sampler: Sampler, room: Room, eos_ids: Sequence[int], prefilled: Prefilled, warn: Callable[[str], None]
    ) -> None:
        hidden_PH = prefilled.hidden_PH
        device, slots = hidden_PH.device, room.slots
        self.room, self.sampler = room, sampler
        with torch.inference_mode(False):  # for training to read what was recorded
            keys = [keys for keys, _ in prefilled.states]
            self.decoding = Decoding(sampler.model, room, keys, warn)
            self.eos_E = torch.tensor(eos_ids, device=device)
            self.prompt_hidden_PH = hidden_PH.new_zeros(room.prompts, hidden_PH.shape[1])
            # Slots without a sequence run, too: what they read has a first position, and they write to their own first.
            self.prompt_length_P = torch.ones(room.prompts, dtype=torch.int64, device=device)
            self.place_S = torch.zeros(slots, dtype=torch.int64, device=device)  # of its prompt
            self.step_S = torch.ones_like(self.place_S)  # tokens that were sampled
            self.writing_S = torch.zeros_like(self.place_S, dtype=torch.bool)
            self.hidden_SH = hidden_PH.new_zeros(slots, hidden_PH.shape[1])
            # Column T is of those that have ended.
            self.uniform_ST = torch.zeros(slots, room.positions + 1, device=device)
            self.mass_SV = torch.empty(slots, sampler.head.weight_VH.shape[0], device=device)
            self.record_at_S = torch.arange(slots, device=device) * (room.positions + 1)
        self.columns_of: dict[int, list[Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Of keys and values, nearly all that is held."""
        return sum(state.keys.nbytes + state.values.nbytes for state in self.decoding.states)

    def width(self, positions: int) -> int:
        """What `step` is told for so many positions of slots: where attention reads true lengths, the same for all."""
        return self.room.positions if self.decoding.flash else min(positions, self.room.positions)

    def begin(self, sampler: Sampler, sampling: Sampling, num_logprobs: int) -> None:
        """Empty all slots and take over the adapter as it is now; `sampler` has the weights that the last one had."""
        self.sampler, self.sampling, self.num_logprobs = sampler, sampling, num_logprobs
        if num_logprobs not in self.columns_of:
            self.columns_of[num_logprobs] = self._columns()
        self.columns = self.columns_of[num_logprobs]
        self.decoding.beside.refresh()
        self.writing_S.zero_()

    @property
    def options(self) -> Hashable:
        """Steps of equal rows and width do the same if these are equal, too."""
        of = self.sampling
        return of.temperature, of.top_p, of.top_k, of.min_p, of.max_new_tokens, self.num_logprobs

    def put_prompts(self, place_P: Tensor, prefilled: Prefilled) -> None:
        """Prompts that have run take places that no sequence needs any more."""
        for layer, states in zip(self.decoding.states, prefilled.states, strict=True):
            layer.put(place_P, *states)
        self.prompt_hidden_PH[place_P] = prefilled.hidden_PH
        self.prompt_length_P[place_P] = sent(torch.tensor(prefilled.lengths), place_P.device)

    def put(self, slot_N: Tensor, place_N: Tensor, uniform_NT: Tensor) -> None:
        """Begin sequences in slots: each of the prompt in a place, with its own uniform numbers."""
        self.hidden_SH[slot_N] = self.prompt_hidden_PH[place_N]
        self.uniform_ST[slot_N, : uniform_NT.shape[1]] = uniform_NT
        self.place_S[slot_N] = place_N
        self.step_S.index_fill_(0, slot_N, 0)
        self.writing_S.index_fill_(0, slot_N, True)

    def move(self, from_M: Tensor, to_M: Tensor, width: int) -> None:
        """Sequences of at most `width` tokens change their slots; their prompts stay."""
        for layer in self.decoding.states:
            layer.move(from_M, to_M, width)
        for state in (*self.columns, self.hidden_SH, self.uniform_ST, self.place_S, self.step_S, self.writing_S):
            state[to_M] = state[from_M]
        self.writing_S.index_fill_(0, from_M, False)

    def step(self, rows: int, width: int) -> None:
        """A token for each of the first `rows` slots, none with more than `width` tokens after it."""
        sampler, step_R, writing_R = self.sampler, self.step_S[:rows], self.writing_S[:rows]
        hidden_RH, place_R = self.hidden_SH[:rows], self.place_S[:rows]
        logits_RV = sampler.head.tempered(sampler.product(hidden_RH))
        logits_RV, mass_RV, total_R1 = masses(logits_RV, self.mass_SV[:rows])
        log_total_R1 = total_R1.log()
        if self.sampling.temperature == 0:
            token_R = logits_RV.argmax(-1)
        else:
            if self.sampling.truncates:
                mass_RV = truncate(logits_RV - log_total_R1, self.sampling).exp()
            token_R = draw(mass_RV, self.uniform_ST[:rows].gather(1, step_R[:, None]).squeeze(1))
        self._record(told(token_R, logits_RV, log_total_R1, hidden_RH, self.num_logprobs), step_R, writing_R)
        step_R += writing_R
        writing_R &= ~(token_R[:, None] == self.eos_E).any(-1) & (step_R < self.sampling.max_new_tokens)
        # What has ended writes over its last token, which nothing reads any more.
        hidden_RH.copy_(self.decoding.step(token_R, place_R, self.prompt_length_P[place_R], step_R - 1, width))

    def _columns(self) -> list[Tensor]:
        """Memory for what `told` gives, [S, T + 1, ...] each."""
        logits_1V = torch.zeros_like(self.mass_SV[:1])
        new = told(self.step_S[:1], logits_1V, logits_1V[:, :1], self.hidden_SH[:1], self.num_logprobs)
        with torch.inference_mode(False):  # as above
            return [one.new_empty(self.room.slots, self.room.positions + 1, *one.shape[1:]) for one in new]

    def _record(self, new: Sequence[Tensor], step_R: Tensor, writing_R: Tensor) -> None:
        at_R = torch.where(writing_R, step_R, self.room.positions) + self.record_at_S[: len(step_R)]
        for column, one in zip(self.columns, new, strict=True):
            column.flatten(0, 1).index_copy_(0, at_R, one)

    def ends(self, recent: int = 0) -> "OnHost":
        """int64 [S]: how many tokens the sequence in each slot has if it has ended, else -1; on their way.

        With `recent` also how many it has, and the last ones, int64 [S, recent]; before its first they mean nothing.
        """
        told = [torch.where(self.writing_S, -1, self.step_S)]
        if recent:
            at_ST = self.step_S[:, None] - torch.arange(recent, 0, -1, device=self.step_S.device)
            told += [self.step_S, self.columns[0].gather(1, at_ST.clamp(min=0))]
        return OnHost(told)

    def recorded(self, slot: int, tokens: int) -> list[Tensor]:
        """Of a sequence that has ended, its tokens and what was recorded of each. A slot may be put to use after it."""
        return [column[slot, :tokens] for column in self.columns]


class OnHost:
    """Tensors on their way to the host. Reading them waits for what the device was told before, and no longer."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        with torch.inference_mode(False):
            self.tensors = [tensor.to("cpu", non_blocking=True, copy=True) for tensor in tensors]
        self.event: Any = None
        if tensors and tensors[0].device.type == CUDA:
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> list[Tensor]:
        if self.event is None:
            return self.tensors
        self.event.synchronize()
        # They are in pinned memory, which is for the next ones.
        with torch.inference_mode(False):
            return [tensor.clone() for tensor in self.tensors]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device, without waiting for what it does now."""
    return (tensor.pin_memory() if device.type == CUDA else tensor).to(device, non_blocking=True)
