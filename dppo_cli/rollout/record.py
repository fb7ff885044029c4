"""What the in-process engine has sampled, kept on its device until a prompt's samples have all ended."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.kernels.top_k import top_k
from dppo_cli.policy.head import Head
from dppo_cli.types import PolicyReport


class Record:
    """What was sampled, of `size` sequences of up to `capacity` tokens; a sequence's tokens are adjacent.

    `writing_B`: those that have not ended. What is added to the others, until they are out of the batch, is no part of
    their response.

    Its memory is allocated at the first step: [size, capacity] tokens (int64) and log-probs (float32), where asked K
    ids and log-probs a token, or the hidden state. Allocated little by little, between tensors that each step frees, it
    would leave holes too small for the next step's slightly longer tensors: 1.2 GiB after 512 steps of a small model.
    """

    def __init__(self, size: int, capacity: int, head: Head, num_logprobs: int) -> None:
        self.size, self.capacity = size, capacity
        self.head, self.num_logprobs = head, num_logprobs
        self.steps = 0
        self.length_B = torch.zeros(size, dtype=torch.int64, device=head.weight_VH.device)
        self.writing_B = torch.ones_like(self.length_B, dtype=torch.bool)
        self.columns: list[Tensor] = []  # [size, capacity, ...] each

    def add(
        self, active_A: Tensor, token_A: Tensor, logits_AV: Tensor, log_total_A1: Tensor, hidden_AH: Tensor
    ) -> None:
        """Keep the sampled token's log-prob and what the approximation asked for."""
        step = told(token_A, logits_AV, log_total_A1, hidden_AH, self.num_logprobs)
        if not self.columns:
            with torch.inference_mode(False):  # for training to read them
                self.columns = [new.new_empty(self.size, self.capacity, *new.shape[1:]) for new in step]
        for column, new in zip(self.columns, step, strict=True):
            column[active_A, self.steps] = new
        self.steps += 1
        self.length_B[active_A] += self.writing_B[active_A]

    def tokens(self) -> Tensor:
        """What was sampled so far, int64 [size, steps]; rows of ended sequences mean nothing from their end on."""
        return self.columns[0][:, : self.steps]

    def reports(self, sequences: Sequence[int]) -> Iterator[tuple[Tensor, PolicyReport]]:
        """Tokens and report of each of these sequences, which have ended."""
        length_B = self.length_B.tolist()
        for b in sequences:
            columns = [column[b, : length_B[b]] for column in self.columns]
            yield columns[0], report_of(columns, self.head, self.num_logprobs)


def told(
    token_A: Tensor, logits_AV: Tensor, log_total_A1: Tensor, hidden_AH: Tensor, num_logprobs: int
) -> list[Tensor]:
    """What is recorded of a step: tokens, their log-probs, and what the approximation asked for; [A, ...] each.

    log mu = logits - log total.
    """
    step = [token_A, (logits_AV.gather(-1, token_A[:, None]) - log_total_A1).squeeze(-1)]
    if num_logprobs > 0:
        values_AK, ids_AK = top_k(logits_AV, num_logprobs)
        step += [ids_AK, values_AK - log_total_A1]
    elif num_logprobs == WHOLE_VOCABULARY:
        step.append(hidden_AH)
    return step


def report_of(columns: Sequence[Tensor], head: Head, num_logprobs: int) -> PolicyReport:
    """From one sequence's part of what `told` gave at each step."""
    _, logp, *more = columns
    if num_logprobs > 0:
        return PolicyReport(logp, topk_ids_NK=more[0], topk_logp_NK=more[1])
    if num_logprobs == WHOLE_VOCABULARY:
        return PolicyReport(logp, hidden_NH=more[0], head=head)
    return PolicyReport(logp)
