"""How sequences are cut into parts that run at once."""

import itertools
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from dppo_cli.policy.forward import CONTEXT_PER_POSITION, SharedPrompts, WholeSequences, split_by_tokens
from dppo_cli.policy.packed_forward import PackedGroups


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


Samples = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 50)), max_size=30)


@given(Samples, st.lists(st.integers(1, 40), min_size=6, max_size=6), st.integers(1, 200))
def test_samples_are_split_by_prompt(samples: Any, prompts: Any, budget: int) -> None:
    lengths = [(prompt, prompts[prompt], own) for prompt, own in samples]
    parts = PackedGroups.split(lengths, budget)
    assert sorted(itertools.chain(*parts)) == list(range(len(samples)))
    for part in parts:
        tokens = sum(prompts[p] for p in {samples[i][0] for i in part}) + sum(samples[i][1] for i in part)
        assert tokens <= budget or len(part) == 1
    # A group that fits into the budget is in one part.
    for number in {prompt for prompt, _ in samples}:
        own = [i for i, (prompt, _) in enumerate(samples) if prompt == number]
        used = [part for part in parts if set(part) & set(own)]
        whole = prompts[number] + sum(samples[i][1] for i in own)
        assert len(used) == 1 or whole > budget


def test_how_groups_are_cut():
    assert PackedGroups.split([(0, 2, 3), (1, 2, 3), (0, 2, 4), (1, 2, 1)], 9) == [[0, 2], [1, 3]]
    assert PackedGroups.split([(0, 2, 3), (1, 2, 3), (0, 2, 4), (1, 2, 1)], 15) == [[0, 2, 1, 3]]
    assert PackedGroups.split([(0, 2, 3), (0, 2, 4), (0, 2, 3), (1, 1, 1)], 9) == [[0, 1], [2, 3]]
    assert PackedGroups.split([(0, 9, 3), (0, 9, 4)], 4) == [[0], [1]]
    assert PackedGroups.split([], 4) == []
