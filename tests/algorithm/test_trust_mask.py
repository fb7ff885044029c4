"""The trust-region mask: which tokens are kept."""

import math

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import PROPERTY, token_batches

from dppo_cli.algorithm.objective import Tokens, trust_mask
from dppo_cli.errors import NumericalError

LOW, HIGH = 0.1, 0.2


def mask(advantage: float, mu: float, pi: float, divergence: float) -> bool:
    columns = (
        torch.tensor([advantage]),
        torch.tensor([mu]).log(),
        torch.tensor([pi]).log(),
        torch.tensor([divergence]),
    )
    return trust_mask(*columns, LOW, HIGH).item()


@pytest.mark.parametrize(
    ("advantage", "pi", "divergence", "kept"),
    [
        (1.0, 0.6, 0.21, False),  # up, away from 1, too far
        (1.0, 0.6, 0.20, True),  # at the threshold itself
        (1.0, 0.6, 0.15, True),  # above the other sign's threshold only
        (1.0, 0.4, 0.99, True),  # up, back towards 1
        (1.0, 0.5, 0.99, True),  # r is exactly 1
        (-1.0, 0.4, 0.11, False),  # down, away from 1, too far
        (-1.0, 0.4, 0.10, True),
        (-1.0, 0.4, 0.09, True),
        (-1.0, 0.6, 0.99, True),  # down, back towards 1
        (-1.0, 0.5, 0.99, True),
        (0.0, 0.6, 0.99, True),  # nothing to mask
        (0.0, 0.4, 0.99, True),
        (1.0, 0.6, math.inf, False),  # an infinite KL is far, not broken
        (-1.0, 0.4, math.inf, False),
        (1e-30, 0.6, 0.21, False),  # the size of A does not matter
    ],
)
def test_mask_case_by_case(advantage, pi, divergence, kept):
    assert mask(advantage, 0.5, pi, divergence) is kept


@PROPERTY
@given(tokens=token_batches())
def test_mask_agrees_with_its_definition(tokens: Tokens):
    found_N = trust_mask(tokens.advantage_N, tokens.logp_mu_N, tokens.logp_pi_N, tokens.divergence_N, *reference.DELTA)
    columns = zip(
        tokens.advantage_N.tolist(),
        tokens.logp_mu_N.exp().tolist(),
        tokens.logp_pi_N.exp().tolist(),
        tokens.divergence_N.tolist(),
        strict=True,
    )
    assert found_N.tolist() == [reference.keep(*column, *reference.DELTA) for column in columns]


@PROPERTY
@given(mu=st.floats(0.01, 0.99), pi=st.floats(0.01, 0.99), size=st.floats(0.01, 10), divergence=st.floats(0, 1e3))
def test_a_step_back_towards_one_is_never_masked(mu, pi, size, divergence):
    assert mask(size if pi <= mu else -size, mu, pi, divergence)


@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("pi", [0.4, 0.5, 0.6])
def test_edge_2_nan_divergence_is_refused(advantage, pi):
    with pytest.raises(NumericalError, match="1 of 1 tokens"):
        mask(advantage, 0.5, pi, math.nan)
