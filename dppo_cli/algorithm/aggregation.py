"""Aggregation: the constant that divides the sum of all token losses of an optimizer batch.

Both choices divide one sum by one number that is known before the first micro-batch runs, so the gradient does not
depend on how the batch is split into micro-batches. The paper sums over the tokens of a response; both choices scale
that sum.
"""

from dataclasses import dataclass
from typing import Protocol


class Aggregation(Protocol):
    """Computes the divisor from the numbers of sampled tokens and sequences, and the longest allowed response."""

    def divisor(self, num_tokens: int, num_sequences: int, max_new_tokens: int) -> float: ...


@dataclass(frozen=True)
class TokenMean:
    """sum / number of sampled tokens. The size of the gradient, and so clipping, does not depend on response length."""

    def divisor(self, num_tokens: int, num_sequences: int, max_new_tokens: int) -> float:
        return float(num_tokens)


@dataclass(frozen=True)
class SeqMeanTokenSum:
    """sum / (sequences x max_new_tokens): Dr. GRPO, arXiv 2503.20783. It is constant, so long responses weigh more."""

    def divisor(self, num_tokens: int, num_sequences: int, max_new_tokens: int) -> float:
        return float(num_sequences * max_new_tokens)
