"""How sequences are cut into parts that run at once."""

import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dppo_cli.policy.forward import CONTEXT_PER_POSITION, SharedPrompts, WholeSequences, split_by_tokens


def padded_size(part: Sequence[int], lengths: Sequence[int], contexts: Sequence[int]) -> float:
    return len(part) * (max(lengths[i] for i in part) + max(contexts[i] for i in part) / CONTEXT_PER_POSITION)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 400)), max_size=30), st.integers(1, 200))
def test_sequences_are_split_by_tokens(sequences: Any, budget: int) -> None:
    lengths, contexts = [n for n, _ in sequences], [c for _, c in sequences]
    parts = split_by_tokens(lengths, contexts, budget)
    assert sorted(itertools.chain(*parts)) == list(range(len(sequences)))
    for part in parts:
        assert len(part) == 1 or padded_size(part, lengths, contexts) <= budget
    # Longest first, and no part is closed while the next sequence would still have fitted.
    for part, following in itertools.pairwise(parts):
        assert min(lengths[i] for i in part) >= max(lengths[i] for i in following)
        assert padded_size([*part, following[0]], lengths, contexts) > budget


def test_equal_lengths_keep_their_order():
    assert split_by_tokens([3, 3, 3, 3], [0] * 4, 6) == [[0, 1], [2, 3]]
    assert split_by_tokens([1, 9, 2, 8], [0] * 4, 18) == [[1, 3], [2, 0]]
    assert split_by_tokens([3, 3, 3, 3], [16, 0, 0, 0], 7) == [[0], [1, 2], [3]]
    assert split_by_tokens([], [], 8) == []


def test_what_counts_of_a_sample():
    """A shared prompt is only attended to; a whole sequence runs both. The prompt's number does not matter."""
    samples = [(0, 160, 3), (1, 160, 3), (2, 160, 3)]
    assert SharedPrompts.split(samples, 26) == [[0, 1], [2]]
    assert SharedPrompts.split(samples, 25) == [[0], [1], [2]]
    assert WholeSequences.split(samples, 326) == [[0, 1], [2]]
    assert WholeSequences.split(samples, 325) == [[0], [1], [2]]
