"""How far one model is from another on the same tokens. Shapes: T tokens of a response, V vocabulary."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dppo_cli.kernels.devices import float64


@dataclass(frozen=True)
class Agreement:
    """Of two next-token distributions p and q, over all positions.

    `kl`: mean of KL(p || q) = sum_a p(a) log(p(a) / q(a)), nats a token. `tv`: mean of 1/2 sum_a |p(a) - q(a)|, in
    [0, 1]. `greedy`: share of positions where both have the same likeliest token. `logit`: the largest difference of
    logits. NaN where a logit is.
    """

    kl: float
    tv: float
    greedy: float
    logit: float
    tokens: int


def agreement(p: Sequence[Tensor], q: Sequence[Tensor]) -> Agreement:
    """Of the logits, float32 [T, V], of the same responses."""
    kl, tv, same, logit, tokens = 0.0, 0.0, 0, 0.0, 0
    for p_TV, q_TV in zip(p, q, strict=True):
        log_p_TV, log_q_TV = float64(p_TV).log_softmax(-1), float64(q_TV).log_softmax(-1)
        p_is_0 = log_p_TV == -torch.inf
        terms_TV = torch.where(p_is_0, 0.0, log_p_TV.exp() * (log_p_TV - log_q_TV))
        kl += float(terms_TV.sum())
        tv += float((log_p_TV.exp() - log_q_TV.exp()).abs().sum()) / 2
        same += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
        logit = max(logit, float((p_TV - q_TV).abs().nan_to_num(nan=torch.inf).max()))
        tokens += len(p_TV)
    return Agreement(kl / tokens, tv / tokens, same / tokens, logit, tokens)
