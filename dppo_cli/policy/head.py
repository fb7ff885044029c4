"""The language-model head, in chunks: log-probs and their gradient without a [tokens, vocabulary] tensor.

The loss reads only the log-prob of each sampled token, so its gradient with respect to a hidden state h is
    d log pi(a) / d h = (W[a] - sum_v pi(v) W[v]) / T,
one row of H numbers that the forward pass can save. Logits exist for one chunk of positions at a time.

Shapes: N positions, H hidden, V vocabulary, C positions of a chunk. T = temperature.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dppo_cli.algorithm.loss import Visitor
from dppo_cli.kernels.products import logits_product, multiply


@dataclass(frozen=True, eq=False)
class Head:
    """log pi = log_softmax(z / T),  z = cap * tanh(u / cap) or u,  u = scale * (W h + b).

    `weight_VH` and `bias_V` are the frozen parameters of the model's output layer, of any float dtype; `softcap` is
    Gemma's final-logit cap; `scale` Cohere's and Granite's logit multiplier.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def at(self, temperature: float) -> "Head":
        """The same head at another temperature."""
        return replace(self, temperature=temperature)

    def product(self, hidden_NH: Tensor) -> Tensor:
        """W h + b, [N, V], in the weight's dtype or float32; see `logits_product`."""
        return logits_product(hidden_NH, self.weight_VH, self.bias_V)

    def tempered(self, product_NV: Tensor) -> Tensor:
        """Logits z / T, float32 [N, V], from W h + b; may overwrite it."""
        z_NV = product_NV.float()
        if self.scale != 1.0:
            z_NV *= self.scale
        if self.softcap is not None:
            z_NV = z_NV.div_(self.softcap).tanh_().mul_(self.softcap)
        return z_NV if self.temperature == 1.0 else z_NV.div_(self.temperature)

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """Tempered logits z / T, float32 [N, V]."""
        return self.tempered(self.product(hidden_NH))

    def log_probs(self, hidden_NH: Tensor) -> Tensor:
        """log pi, float32 [N, V]."""
        return self.log_probs_and_probs(hidden_NH)[0]

    def log_probs_and_probs(self, hidden_NH: Tensor, out_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log pi and pi, float32 [N, V] each, from one exponential; pi in the memory of `out_NV`, if given."""
        shifted_NV, mass_NV, total_N1 = masses(self.logits(hidden_NH), out_NV)
        return shifted_NV.sub_(total_N1.log()), mass_NV.div_(total_N1)


def masses(logits_NV: Tensor, out_NV: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits less their maximum, s; m = exp(s); sum m: float32 [N, V], [N, V], [N, 1]. log pi = s - log sum m.

    Enough to sample a token from, and less work than log pi and pi of every token. s overwrites `logits_NV`; m goes
    into `out_NV`, if given.
    """
    logits_NV -= logits_NV.amax(-1, keepdim=True)
    m_NV = torch.exp(logits_NV, out=out_NV)
    return logits_NV, m_NV, m_NV.sum(-1, keepdim=True)


def token_log_probs(
    head: Head, hidden_NH: Tensor, token_N: Tensor, chunk_size: int, visit: Visitor | None = None
) -> tuple[Tensor, Tensor]:
    """Log-prob of each token, and the entropy of its distribution, in nats; float32 [N] each.

    Only the log-prob carries gradient, to `hidden_NH`. Extra memory: one chunk of logits twice, and [N, H].
    """
    logp_N, entropy_N = _TokenLogProbs.apply(hidden_NH, token_N, head, chunk_size, visit)  # type: ignore[no-untyped-call]
    return logp_N, entropy_N


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, token_N: Tensor, head: Head, chunk_size: int, visit: Visitor | None
    ) -> tuple[Tensor, Tensor]:
        n = hidden_NH.shape[0]
        logp_N = hidden_NH.new_empty(n, dtype=torch.float32)
        entropy_N = torch.empty_like(logp_N)
        needs_gradient = ctx.needs_input_grad[0]
        slope_NH = torch.empty_like(hidden_NH) if needs_gradient else None
        # Allocated once: the system would have to find and clear this much memory for every chunk.
        buffer_CV = hidden_NH.new_empty(min(chunk_size, n), head.weight_VH.shape[0], dtype=torch.float32)
        for start in range(0, n, chunk_size):
            rows = slice(start, min(start + chunk_size, n))
            log_pi_CV, pi_CV = head.log_probs_and_probs(hidden_NH[rows], buffer_CV[: rows.stop - start])
            logp_N[rows] = log_pi_CV.gather(-1, token_N[rows, None]).squeeze(-1)
            if visit is not None:
                visit(rows, log_pi_CV)
            # A forbidden token (log pi = -inf) adds nothing to the entropy; 0 * -inf would make it NaN.
            entropy_N[rows] = -log_pi_CV.clamp_(min=torch.finfo(torch.float32).min).mul_(pi_CV).sum(-1)
            del log_pi_CV  # freed before the next chunk's are made
            if slope_NH is not None:
                slope_NH[rows] = _slope(head, hidden_NH[rows], token_N[rows], pi_CV)
        ctx.save_for_backward(slope_NH)
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    def backward(ctx: Any, grad_logp_N: Tensor, _: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope_NH,) = ctx.saved_tensors
        return slope_NH * grad_logp_N[:, None].to(slope_NH.dtype), None, None, None, None


def _slope(head: Head, hidden_CH: Tensor, token_C: Tensor, pi_CV: Tensor) -> Tensor:
    """d log pi(token) / d hidden, [C, H]; overwrites `pi_CV`."""
    # 1 - pi(token) in float32, before any rounding to the weights' precision: bfloat16 takes 0.998 for 1.
    slope_z_CV = pi_CV.neg_().scatter_add_(-1, token_C[:, None], torch.ones_like(pi_CV[:, :1]))
    if head.softcap is not None:
        slope_z_CV *= 1 - (head.at(1.0).logits(hidden_CH) / head.softcap).square()
    return multiply(slope_z_CV, head.weight_VH.t()).mul_(head.scale / head.temperature)
