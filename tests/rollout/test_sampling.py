"""Drawing and truncating, against exact probabilities and a reference in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo_cli.config.sections import Sampling
from dppo_cli.rollout.sampling import draw, truncate

LARGEST = 1 - 2**-24  # the largest float32 below 1
settings.register_profile("tests", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tests")


def log_probs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log().float()[None]


def draw_one(log_mu_1V: torch.Tensor, uniform: float) -> int:
    return int(draw(log_mu_1V.exp(), torch.tensor([uniform])))


@pytest.mark.parametrize(
    ("uniform", "token"),
    [(0.0, 0), (0.2499, 0), (0.2501, 2), (0.7499, 2), (0.7501, 3), (0.8749, 3), (0.8751, 4), (LARGEST, 4)],
)
def test_a_token_is_drawn_where_its_mass_lies(uniform, token):
    assert draw_one(log_probs(0.25, 0.0, 0.5, 0.125, 0.125, 0.0), uniform) == token


def test_mass_zero_in_front_is_never_drawn():
    assert draw_one(log_probs(0.0, 0.0, 0.5, 0.5), 0.0) == 2


def test_each_row_has_its_own_distribution_and_number():
    log_mu_BV = torch.cat([log_probs(0.5, 0.5, 0.0), log_probs(0.0, 0.5, 0.5), log_probs(0.0, 0.0, 1.0)])
    assert draw(log_mu_BV.exp(), torch.tensor([0.9, 0.1, 0.0])).tolist() == [1, 1, 2]
    assert draw(log_mu_BV.exp(), torch.tensor([0.1, 0.9, LARGEST])).tolist() == [0, 2, 2]


def test_an_even_grid_of_numbers_gives_each_token_its_share():
    """Also where truncation has taken mass away: what is left is drawn in proportion."""
    log_mu_1V = log_probs(0.1, 0.2, 0.05, 0.25, 0.4)
    log_mu_1V[0, 2] = -torch.inf
    log_mu_1V[0, 4] = -torch.inf
    uniform_B = (torch.arange(1100, dtype=torch.float64) + 0.5).div(1100).float()
    counts = torch.bincount(draw(log_mu_1V.exp().repeat(1100, 1), uniform_B), minlength=5)
    assert (counts - torch.tensor([200, 400, 0, 500, 0])).abs().max() <= 1
    assert counts[2] == counts[4] == 0


@given(
    st.lists(st.one_of(st.floats(-40, 5, width=32), st.just(-math.inf)), min_size=1, max_size=40).filter(
        lambda logits: max(logits) > -math.inf
    ),
    st.one_of(st.sampled_from([0.0, 2.0**-24, 0.5, LARGEST]), st.floats(0, LARGEST, width=32)),
)
def test_the_number_falls_into_the_tokens_interval(logits, uniform):
    log_mu_1V = torch.tensor([logits], dtype=torch.float32).log_softmax(-1)
    token = draw_one(log_mu_1V, uniform)
    p_V = log_mu_1V[0].double().exp()
    assert p_V[token].float() > 0
    assert p_V[:token].sum() - 1e-5 <= uniform * p_V.sum() <= p_V[: token + 1].sum() + 1e-5


@pytest.mark.parametrize("uniform", [0.0, 0.3, LARGEST])
def test_a_large_vocabulary_whose_sum_is_rounded(uniform):
    """Float32 sums of 100,000 probabilities miss 1 by more than a rounding step; the last token is still a real one."""
    generator = torch.Generator().manual_seed(0)
    log_mu_1V = torch.randn(1, 100_000, generator=generator).mul(3).log_softmax(-1)
    log_mu_1V[0, -50_000:] = -torch.inf
    token = draw_one(log_mu_1V, uniform)
    assert 0 <= token < 50_000


def naive_kept(probabilities: list[float], top_k: int, top_p: float, min_p: float) -> list[bool]:
    """Each rule by itself on the whole distribution; what all of them allow."""
    ranked = sorted(range(len(probabilities)), key=lambda v: -probabilities[v])
    by_k = set(ranked[:top_k] if top_k else ranked)
    by_p, mass = set(), 0.0
    for v in ranked:
        if mass >= top_p:
            break
        by_p.add(v)
        mass += probabilities[v]
    by_min = {v for v in ranked if probabilities[v] >= min_p * probabilities[ranked[0]]}
    return [v in by_k & (by_p if top_p < 1 else set(ranked)) & by_min for v in range(len(probabilities))]


@pytest.mark.parametrize("top_k", [0, 1, 3, 12, 40])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.5])
def test_truncation_agrees_with_a_reference(top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(top_k)
    log_mu_BV = torch.randn(5, 20, generator=generator).mul(2).log_softmax(-1)
    found_BV = truncate(log_mu_BV, Sampling(1.0, top_p, top_k, min_p, 1, []))
    kept_BV = torch.tensor([naive_kept(row.double().exp().tolist(), top_k, top_p, min_p) for row in log_mu_BV])
    assert torch.equal(found_BV > -torch.inf, kept_BV)
    assert torch.equal(found_BV[kept_BV], log_mu_BV[kept_BV])
    assert kept_BV.any(-1).all()


def test_ties_at_the_boundary_are_kept():
    log_mu_1V = log_probs(0.2, 0.3, 0.2, 0.2, 0.1)
    assert (truncate(log_mu_1V, Sampling(1.0, 1.0, 2, 0.0, 1, [])) > -torch.inf).tolist() == [[1, 1, 1, 1, 0]]
    assert (truncate(log_mu_1V, Sampling(1.0, 0.4, 0, 0.0, 1, [])) > -torch.inf).tolist() == [[1, 1, 1, 1, 0]]
    assert (truncate(log_mu_1V, Sampling(1.0, 0.29, 0, 0.0, 1, [])) > -torch.inf).tolist() == [[0, 1, 0, 0, 0]]


def test_truncation_leaves_its_input_alone():
    log_mu_1V = log_probs(0.2, 0.5, 0.3)
    before = log_mu_1V.clone()
    truncate(log_mu_1V, Sampling(1.0, 0.5, 1, 0.9, 1, []))
    assert torch.equal(log_mu_1V, before)
