"""Aggregation: the constant that divides the sum of all token losses of an optimizer batch.

Both choices divide one sum by one number that is known before the first micro-batch runs, so the gradient does not
depend on how the batch is cut. The paper writes a token sum per response; both are that sum, scaled.
"""

from dataclasses import dataclass
from typing import Protocol


class Aggregation(Protocol):
    """The divisor from the number of sampled tokens, of sequences, and the most tokens a response may have."""

    def divisor(self, num_tokens: int, num_sequences: int, max_new_tokens: int) -> float: ...


@dataclass(frozen=True)
class TokenMean:
    """sum / number of sampled tokens: the gradient's size, and so clipping, does not depend on response length."""

    def divisor(self, num_tokens: int, num_sequences: int, max_new_tokens: int) -> float:
        return float(num_tokens)


@dataclass(frozen=True)
class SeqMeanTokenSum:
    """sum / (sequences x max_new_tokens): Dr. GRPO, arXiv 2503.20783. A constant, so long answers weigh more."""

    def divisor(self, num_tokens: int, num_sequences: int, max_new_tokens: int) -> float:
        return float(num_sequences * max_new_tokens)
