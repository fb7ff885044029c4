"""The method's formulas written naively in float64, one token or one outcome at a time, and builders for tests.

No formula of the package is used here, so an error has to be made twice, in two ways, to pass unseen.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from dppo_cli.algorithm.objective import Tokens

PROPERTY = settings(max_examples=50, deadline=None, derandomize=True, database=None)
"""For every property: the same examples on every machine."""

ULP = 2.0**-24
"""Half the spacing of float32 just below 1: the rounding error of one operation on probabilities."""


# Distributions -------------------------------------------------------------------------------------------------------


def tv(mu: list[float], pi: list[float]) -> float:
    return sum(abs(m - p) for m, p in zip(mu, pi, strict=True)) / 2


def kl(mu: list[float], pi: list[float]) -> float:
    return sum(m * (math.log(m) - math.log(p)) for m, p in zip(mu, pi, strict=True) if m > 0)


def likeliest(p: list[float], k: int) -> list[int]:
    return sorted(range(len(p)), key=lambda i: -p[i])[:k]


def merged(p: list[float], named: list[int]) -> list[float]:
    """The probabilities of the named outcomes, each once, and of all the others together."""
    kept = sorted(set(named))
    return [p[i] for i in kept] + [sum(p[i] for i in range(len(p)) if i not in kept)]


def softmax(logits: list[float]) -> list[float]:
    total = sum(math.exp(z) for z in logits)
    return [math.exp(z) / total for z in logits]


def logs(*rows: list[float]) -> Tensor:
    """Natural logarithms, float32 [rows, outcomes]; log 0 is -inf."""
    return torch.tensor(rows, dtype=torch.float64).log().float()


@dataclass(frozen=True)
class Pair:
    """Two policies over one vocabulary, and the token that was sampled."""

    mu: list[float]
    pi: list[float]
    token: int

    @property
    def logs(self) -> tuple[Tensor, Tensor]:
        return logs(self.mu), logs(self.pi)


@st.composite
def pairs(draw: st.DrawFn, spread: float = 3.0) -> Pair:
    size = draw(st.integers(2, 8))
    logits = st.lists(st.floats(-spread, spread), min_size=size, max_size=size)
    return Pair(softmax(draw(logits)), softmax(draw(logits)), draw(st.integers(0, size - 1)))


# Tokens --------------------------------------------------------------------------------------------------------------


DELTA = (0.1, 0.2)
"""Thresholds of the tokens that `token_batches` makes, for A < 0 and A > 0."""


def keep(advantage: float, mu: float, pi: float, divergence: float, low: float, high: float) -> bool:
    """The mask of one token, spelled as the method's two sentences."""
    if advantage > 0 and pi / mu > 1 and divergence > high:
        return False
    return not (advantage < 0 and pi / mu < 1 and divergence > low)


def make_tokens(
    mu: list[float],
    pi: list[float],
    advantage: list[float],
    divergence: list[float] | None = None,
    *,
    anchor: list[float] | None = None,
    sequence: list[int] | None = None,
    delta: tuple[float, float] = (0.15, 0.15),
    dtype: torch.dtype = torch.float64,
) -> Tokens:
    """Tokens from probabilities; the log-probs of pi are a leaf with gradient."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    divergence_N = column(divergence or [0.0] * len(mu)).to(dtype)
    return Tokens(
        logp_pi_N=column(pi).log().to(dtype).requires_grad_(),
        logp_mu_N=column(mu).log().to(dtype),
        logp_anchor_N=column(anchor or mu).log().to(dtype),
        advantage_N=column(advantage).to(dtype),
        divergence_N=divergence_N,
        distance_N=divergence_N,
        limit_N=column([delta[a > 0] for a in advantage]).to(dtype),
        sequence_N=torch.tensor(sequence or [0] * len(mu)),
    )


def gradient(objective: Any, tokens: Tokens) -> Tensor:
    """d (sum of losses) / d log pi, [N]."""
    (found_N,) = torch.autograd.grad(objective(tokens).loss_N.sum(), tokens.logp_pi_N)
    return found_N


def naive_gradient(loss_of_token: Callable[[Tensor, Tensor, Tensor, int], Tensor], tokens: Tokens) -> Tensor:
    """Autograd through a loss written for one token: f(pi, mu, A, index) of 0-dimensional float64 tensors."""
    logp_pi_N = tokens.logp_pi_N.detach().double().requires_grad_()
    mu_N, advantage_N = tokens.logp_mu_N.double().exp(), tokens.advantage_N.double()
    losses = [loss_of_token(x.exp(), mu_N[i], advantage_N[i], i) for i, x in enumerate(logp_pi_N)]
    (found_N,) = torch.autograd.grad(sum(losses), logp_pi_N)
    return found_N


def ppo_loss(r: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """min(r A, clip(r) A), to be maximised, as a loss."""
    return -torch.minimum(r * advantage, r.clamp(1 - low, 1 + high) * advantage)


def same(found_N: Tensor, expected_N: Tensor | list[float]) -> None:
    """Equal up to float64 rounding, where a weight is the exponential of a difference of logarithms up to 10."""
    expected_N = torch.as_tensor(expected_N, dtype=torch.float64)
    torch.testing.assert_close(found_N, expected_N, atol=1e-12, rtol=1e-12)


@st.composite
def token_batches(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> Tokens:
    """One to six tokens, with ratios up to e^2 either way and advantages of both signs and zero."""
    size = draw(st.integers(1, 6))

    def column(values: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(values, min_size=size, max_size=size))

    mu = [math.exp(x) for x in column(st.floats(-8, -0.01))]
    pi = [min(1.0, m * math.exp(x)) for m, x in zip(mu, column(st.floats(-2, 2)), strict=True)]
    advantage = column(st.one_of(st.just(0.0), st.floats(0.1, 2), st.floats(-2, -0.1)))
    sequence = draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    return make_tokens(mu, pi, advantage, column(st.floats(0, 0.4)), sequence=sequence, delta=DELTA, dtype=dtype)
