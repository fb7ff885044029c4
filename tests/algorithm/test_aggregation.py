import pytest
import torch

from dppo_cli.algorithm.aggregation import SeqMeanTokenSum, TokenMean

LENGTHS = [3, 1, 5, 2]
MOST = 8


def test_token_mean_by_hand():
    assert TokenMean().divisor(num_tokens=11, num_sequences=4, max_new_tokens=8) == 11.0


def test_seq_mean_token_sum_by_hand():
    assert SeqMeanTokenSum().divisor(num_tokens=11, num_sequences=4, max_new_tokens=8) == 32.0


def test_seq_mean_token_sum_does_not_depend_on_what_was_written():
    assert SeqMeanTokenSum().divisor(1, 4, 8) == SeqMeanTokenSum().divisor(1000, 4, 8)


def losses() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=generator, dtype=torch.float64) for n in LENGTHS]


def test_token_mean_is_the_mean_over_all_tokens():
    divisor = TokenMean().divisor(sum(LENGTHS), len(LENGTHS), MOST)
    assert sum(x.sum() for x in losses()).item() / divisor == pytest.approx(torch.cat(losses()).mean().item())


def test_seq_mean_token_sum_is_a_mean_over_sequences_of_sums_over_a_constant():
    divisor = SeqMeanTokenSum().divisor(sum(LENGTHS), len(LENGTHS), MOST)
    per_sequence = torch.stack([x.sum() / MOST for x in losses()])
    assert sum(x.sum() for x in losses()).item() / divisor == pytest.approx(per_sequence.mean().item())
