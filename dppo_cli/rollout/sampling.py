"""What the in-process engine is asked for, and drawing tokens from probabilities. Shapes: B sequences, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_cli.config.sections import Sampling
from dppo_cli.types import PolicyReport, Prompt

Sampled = tuple[Tensor, PolicyReport]
"""A response's tokens, int64 [T], and what the policy said of them."""


@dataclass(frozen=True)
class Wanted:
    """`group` responses to each prompt. `seeds`: one a prompt, for the uniform numbers of its samples at each step."""

    prompts: Sequence[Prompt]
    group: int
    sampling: Sampling
    num_logprobs: int
    seeds: Sequence[int]


def draw(mu_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Tokens int64 [B] by inverse CDF: the first whose cumulative probability exceeds a uniform number in [0, 1).

    `mu_BV`: float32 probabilities, up to a factor per row; overwritten. One cumulative sum and one search per row;
    `torch.multinomial` costs forty times as much on a large vocabulary.
    """
    cdf_BV = mu_BV.cumsum_(-1)
    total_B1 = cdf_BV[:, -1:]
    # u * total may round up to total, which no token exceeds; just below it there always is one with mass.
    threshold_B1 = torch.minimum(uniform_B[:, None] * total_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    # Past the end only where the probabilities are NaN, which shows in the token's log-prob.
    return torch.searchsorted(cdf_BV, threshold_B1, right=True).squeeze(-1).clamp_(max=cdf_BV.shape[-1] - 1)


def truncate(log_mu_BV: Tensor, sampling: Sampling) -> Tensor:
    """Log-probs with what top_k, top_p and min_p forbid at -inf (not renormalised: `draw` does not need it).

    Ties at a boundary are kept. The likeliest token always stays.
    """
    kept_BV = torch.ones_like(log_mu_BV, dtype=torch.bool)
    if 0 < sampling.top_k < log_mu_BV.shape[-1]:
        kept_BV &= log_mu_BV >= log_mu_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
    if sampling.top_p < 1:
        sorted_BV = log_mu_BV.sort(dim=-1, descending=True).values
        mass_before_BV = sorted_BV.exp().cumsum(-1) - sorted_BV.exp()
        nucleus_size_B1 = (mass_before_BV < sampling.top_p).sum(-1, keepdim=True)
        kept_BV &= log_mu_BV >= sorted_BV.gather(-1, nucleus_size_B1 - 1)
    if sampling.min_p > 0:
        kept_BV &= log_mu_BV.exp() >= sampling.min_p * log_mu_BV.amax(-1, keepdim=True).exp()
    return log_mu_BV.masked_fill(~kept_BV, -torch.inf)
