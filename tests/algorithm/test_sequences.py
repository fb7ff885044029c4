"""Sums over responses, against one response at a time in float64."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY

from dppo_cli.algorithm.sequences import Responses

TOKENS = st.lists(st.tuples(st.integers(0, 4), st.floats(0, 2, width=32)), min_size=1, max_size=30)


@PROPERTY
@given(tokens=TOKENS, q=st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_each_response_by_itself(tokens: list[tuple[int, float]], q: float):
    """In any order, and with numbers that no token has."""
    row_N, value_N = torch.tensor([t[0] for t in tokens]), torch.tensor([t[1] for t in tokens])
    responses = Responses(row_N)
    own = [[value for row, value in tokens if row == which] for which, _ in tokens]
    expected = {
        "sum": (responses.sum(value_N), [sum(values) for values in own]),
        "mean": (responses.mean(value_N), [sum(values) / len(values) for values in own]),
        "quantile": (responses.flat(responses.quantile(value_N, q)), [numpy.quantile(values, q) for values in own]),
    }
    for found_N, values in expected.values():
        torch.testing.assert_close(found_N, torch.tensor(values, dtype=torch.float32), atol=2e-6, rtol=1e-6)
    assert responses.all(value_N < 1).tolist() == [all(value < 1 for value in values) for values in own]
    assert torch.equal(responses.flat(responses.padded(value_N)), value_N)


def test_rows_are_padded_in_the_order_of_their_tokens():
    responses = Responses(torch.tensor([0, 2, 0, 2, 2]))
    value_BT = responses.padded(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), padding=-1.0)
    assert value_BT.tolist() == [[1, 3, -1], [-1, -1, -1], [2, 4, 5]]
    assert responses.count_B1.tolist() == [[2], [0], [3]]


def test_a_quantile_of_infinite_values_is_no_nan():
    found = Responses(torch.zeros(3, dtype=torch.int64)).quantile(torch.tensor([0.1, torch.inf, torch.inf]), 0.9)
    assert found.item() == pytest.approx(torch.finfo(torch.float32).max)
