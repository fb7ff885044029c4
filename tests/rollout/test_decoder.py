"""The decoder against forward passes over whole sequences, and its cache against transformers' own."""

import make
import pytest
import tiny
import torch
from transformers.cache_utils import DynamicLayer

from dppo_cli.policy.forward import hidden_states
from dppo_cli.rollout.decoder import Decoder, PreallocatedLayer, compact

CPU = torch.device("cpu")


def states(batch: int, length: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, length, 4, generator=generator), torch.randn(batch, 2, length, 4, generator=generator)


def prompts_layer(batch: int, length: int, generator: torch.Generator) -> DynamicLayer:
    layer = DynamicLayer()
    layer.update(*states(batch, length, generator))
    return layer


def test_the_preallocated_layer_is_a_dynamic_layer():
    generator = torch.Generator().manual_seed(0)
    theirs = prompts_layer(3, 5, generator)
    ours = PreallocatedLayer(theirs, repeats=2, capacity=20, padded=False)
    theirs.batch_repeat_interleave(2)

    def update(batch: int, length: int) -> None:
        new = states(batch, length, generator)
        for found, expected in zip(ours.update(*new), theirs.update(*(s.clone() for s in new)), strict=True):
            assert torch.equal(found, expected)
        agree()

    def agree() -> None:
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert ours.get_mask_sizes(1) == theirs.get_mask_sizes(1)

    def leave(writing: list[int]) -> None:
        rows = compact(torch.tensor(writing).bool(), CPU)
        ours.keep(rows)
        theirs.batch_select_indices(rows.kept_A)

    agree()
    for _ in range(3):
        update(6, 1)
    leave([1, 0, 1, 0, 0, 1])
    agree()
    update(3, 1)
    update(3, 2)
    leave([0, 1, 0])
    agree()
    update(1, 9)
    assert ours.get_seq_length() == 20


def test_a_step_writes_into_the_same_memory():
    generator = torch.Generator().manual_seed(0)
    prompts = prompts_layer(2, 3, generator)
    kept = prompts.keys.clone()
    layer = PreallocatedLayer(prompts, repeats=1, capacity=8, padded=False)
    address = layer.keys.data_ptr()
    for _ in range(2):
        layer.update(*states(2, 1, generator))
        assert layer.keys.data_ptr() == address
    assert torch.equal(prompts.keys, kept), "the model's own tensor was written to"


ENDING = [
    [],  # one of twelve ends: too few to make the batch smaller
    [4],
    [0, 7, 8],
    [],
    [1, 2, 3, 5],
    [6, 9],
    [],
]
"""Which of the sequences end after each step."""


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
@pytest.mark.parametrize(
    "texts",
    [make.MIXED, ("12+34=56", "abcdefgh", "A.B,C:D<", "????????"), make.ALIKE],
    ids=["padded", "even", "begin alike"],
)
@torch.no_grad()
def test_hidden_states_are_those_of_whole_sequences(train_config, architecture, texts):
    policy = make.policy(train_config(model=architecture))
    prompts = make.prompts(policy, texts)
    decoder = Decoder(policy.model, prompts, 3, len(ENDING) + 1, policy.pad_id)
    sequences = [list(prompts[b // 3].token_ids) for b in range(12)]
    generator = torch.Generator().manual_seed(1)
    writing = list(range(12))
    sizes = []

    def agree(hidden_AH: torch.Tensor) -> None:
        assert len(hidden_AH) == len(writing)
        for b, hidden_H in zip(writing, hidden_AH, strict=True):
            expected_H = hidden_states(policy, torch.tensor([sequences[b]]))[0, -1]
            torch.testing.assert_close(hidden_H, expected_H, rtol=1e-5, atol=1e-5)

    agree(decoder.prefill())
    for ending in ENDING:
        rows = compact(torch.tensor([b not in ending for b in writing]), CPU)
        if ending:
            decoder.keep(rows)
        writing = [writing[row] for row in rows.kept_A.tolist()]
        token_A = torch.randint(3, 70, (len(writing),), generator=generator)
        for b, token in zip(writing, token_A.tolist(), strict=True):
            sequences[b].append(token)
        agree(decoder.step(token_A))
        sizes.append(decoder.length_B1.shape[0])
    assert sizes == [12, 11, 8, 8, 4, 2, 2], "finished sequences leave the batch"


@pytest.mark.parametrize(
    ("writing", "rows"),
    [
        ([1, 1, 1], [0, 1, 2]),
        ([0, 1, 1, 1], [3, 1, 2]),
        ([1, 0, 1, 0, 1], [0, 4, 2]),
        ([0, 0, 1, 1], [2, 3]),
        ([1, 1, 0, 0], [0, 1]),
        ([0, 0], []),
    ],
)
def test_rows_that_are_kept_stay_in_place_where_they_can(writing, rows):
    found = compact(torch.tensor(writing).bool(), CPU)
    assert found.kept_A.tolist() == rows
    assert found.to_M.tolist() == [i for i, row in enumerate(rows) if i != row]
    assert found.from_M.tolist() == [row for i, row in enumerate(rows) if i != row]


def test_leaving_copies_only_the_rows_that_move():
    generator = torch.Generator().manual_seed(0)
    layer = PreallocatedLayer(prompts_layer(4, 3, generator), repeats=1, capacity=8, padded=False)
    address, expected = layer.keys.data_ptr(), layer.keys[torch.tensor([0, 3, 2])].clone()
    layer.keep(compact(torch.tensor([1, 0, 1, 1]).bool(), CPU))
    assert layer.keys.data_ptr() == address
    assert torch.equal(layer.keys, expected)
