"""Texts that end a response (`sampling.stop`)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

PARTIAL = "\ufffd"
"""What a token decodes to that holds some bytes of a character."""
BATCH = 4096


class StopStrings:
    """Says which sequences have just completed one of `strings`.

    Only tokens whose text holds the last character of a string can complete one, so that few sequences are decoded.
    """

    def __init__(self, strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # A token has one byte of text at least, unless it is a special one; some more for those.
        self.tail = max(len(string.encode()) for string in strings) + 8
        self.completes_V = torch.tensor(_completing(self.strings, tokenizer))

    def ended(self, tokens_BT: Tensor, active_A: Tensor) -> Tensor:
        """Bool [A] on the CPU, for the sequences `active_A` of all B, whose last token is the last column."""
        tails_AT = tokens_BT[active_A, -self.tail :].cpu()
        last_A = tails_AT[:, -1].clamp(max=len(self.completes_V) - 1)  # of a vocabulary padded beyond the tokenizer
        ended_A = self.completes_V[last_A]
        for a in ended_A.nonzero().squeeze(-1).tolist():
            ended_A[a] = self.in_text(self.tokenizer.decode(tails_AT[a].tolist()))
        return ended_A

    def first_end(self, tokens: list[int], start: int) -> int | None:
        """How many tokens a sequence has when it first completes one of the strings, with a token from `start` on."""
        for count in range(start + 1, len(tokens) + 1):
            last = min(tokens[count - 1], len(self.completes_V) - 1)
            tail = tokens[max(0, count - self.tail) : count]
            if self.completes_V[last] and self.in_text(self.tokenizer.decode(tail)):
                return count
        return None

    def in_text(self, text: str | list[str]) -> bool:
        return any(string in text for string in self.strings)


def before_first(text: str, strings: Sequence[str]) -> str:
    """The text up to where the first of the strings begins; all of it where none does: special tokens show no text."""
    begins = [at for string in strings if (at := text.find(string)) >= 0]
    return text[: min(begins)] if begins else text


def _completing(strings: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """For every token, whether it may hold the last character of one of the strings."""
    size = len(tokenizer)
    last = {string[-1] for string in strings} | {PARTIAL}
    if any(character.isspace() for character in last):
        return [True] * size  # Alone, a token may decode without the spaces around it.
    found: list[bool] = []
    for start in range(0, size, BATCH):
        texts = tokenizer.batch_decode([[i] for i in range(start, min(start + BATCH, size))])
        found += [not last.isdisjoint(text) for text in texts]
    return found
