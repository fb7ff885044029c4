"""The table of masked tokens by how likely the sampler found them."""

import pytest
import torch

from dppo_cli.telemetry.masked_by_mu import MaskedByMu
from dppo_cli.types import TokenStats


def stats(*tokens: tuple[float, float, float, bool]) -> TokenStats:
    """Of mu, pi, advantage and keep of each."""
    mu_N, pi_N, advantage_N, keep = (torch.tensor(column) for column in zip(*tokens, strict=True))
    zero_N = torch.zeros_like(mu_N)
    log_ratio_N = (pi_N / mu_N).log()
    none_N = zero_N.bool()
    return TokenStats(zero_N.long(), mu_N, pi_N, log_ratio_N, zero_N, advantage_N, keep, zero_N, zero_N, none_N, none_N)


def test_rows_by_hand():
    table = MaskedByMu()
    table.add(stats((0.5, 0.9, 1.0, False), (0.2, 0.2, 0.5, True), (3e-3, 4e-3, 1.0, True), (0.5, 0.5, 0.0, True)))
    table.add(stats((2e-3, 4e-3, 1.0, False), (1e-12, 1e-3, -1.0, False)))
    high, low, below = table.rows()
    assert (high["advantage"], high["mu_from"], high["seen"], high["masked"]) == ("+", 0.1, 2, 1)
    assert (high["mean_shift"], high["mean_shift_masked"]) == (pytest.approx(0.2), pytest.approx(0.4))
    assert (low["advantage"], low["mu_from"], low["seen"], low["masked"]) == ("+", 0.001, 2, 1)
    assert (low["mean_shift"], low["mean_shift_masked"]) == (pytest.approx(1.5e-3), pytest.approx(2e-3))
    assert (below["advantage"], below["mu_from"], below["seen"], below["masked"]) == ("-", 0.0, 1, 1)


def test_ends_of_the_range_and_no_masked_token():
    table = MaskedByMu()
    table.add(stats((1.0, 1.0, -1.0, True), (0.0, 0.0, -1.0, True)))
    assert [(row["mu_from"], row["mean_shift_masked"]) for row in table.rows()] == [(0.1, None), (0.0, None)]


def test_a_run_without_tokens_has_no_rows():
    assert MaskedByMu().rows() == []
