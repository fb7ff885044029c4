"""Attention over prompts and their responses in one row of tokens, without padding and without a mask.

A response's token attends to its prompt and, causally, to its own response. Each of the two is an attention of its own,
with output o and log-sum-exp l of its scores; together they are, exactly,
    l = log(exp(l_1) + exp(l_2)),  o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2.
Going back, each part gets the gradient of the whole from o and l of the whole, because a score's probability is
exp(score - l) in either (arXiv 2205.14135, appendix B.4); what both ask of a query, key or value is added up.

Shapes: S tokens of the row, Q query heads, K key heads, D head size; T tokens of a segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """What the row consists of: all prompts, then the responses to the first, to the second, and so on.

    Example: with prompts of 3 and 2 tokens, responses of 4 and 1 tokens to the first and one of 5 to the second, the
    row has the 15 tokens of `prompts` (3, 2) and `responses` ((4, 1), (5,)). Prompts without a response are last; a
    response has at least one token.
    """

    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        answered = [bool(of) for of in self.responses]
        assert len(self.prompts) == len(self.responses) and answered == sorted(answered, reverse=True)
        assert min(self.prompts) > 0 and all(n > 0 for of in self.responses for n in of)

    @property
    def prompt_tokens(self) -> int:
        return sum(self.prompts)

    @cached_property
    def own(self) -> "Pairs":
        """Each segment with itself."""
        ends = _ends([*self.prompts, *(n for of in self.responses for n in of)])
        return Pairs(ends, ends, causal=True)

    @cached_property
    def across(self) -> "Pairs | None":
        """The responses to each prompt, counted from the first response on, with that prompt."""
        answered = [(prompt, sum(of)) for prompt, of in zip(self.prompts, self.responses, strict=True) if of]
        if not answered:
            return None
        return Pairs(_ends([n for _, n in answered]), _ends([n for n, _ in answered]), causal=False)


@dataclass(frozen=True)
class Pairs:
    """Where the queries of each attention end that is computed by itself, and where its keys; both begin with 0."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool

    @cached_property
    def slices(self) -> list[tuple[slice, slice]]:
        return [(slice(*q), slice(*k)) for q, k in zip(pairwise(self.queries), pairwise(self.keys), strict=True)]

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Queries and keys."""
        return tuple(max(b - a for a, b in pairwise(ends)) for ends in (self.queries, self.keys))  # type: ignore[return-value]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both ends, int32."""
        if device not in self._copies:
            self._copies[device] = tuple(  # type: ignore[assignment]
                torch.tensor(ends, dtype=torch.int32, device=device) for ends in (self.queries, self.keys)
            )
        return self._copies[device]

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}


class Kernel(Protocol):
    """Attention of `pairs`, without gradient, and its backward pass. Queries [T, Q, D], keys and values [T, K, D]."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """Output [T, Q, D], log-sum-exp of the scores [Q, T], and what `backward` wants besides."""
        ...

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v, from output and log-sum-exp of the whole attention that the pairs are part of."""
        ...


def attend(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, kernel: type[Kernel] | None = None
) -> Tensor:
    """Attention over a row of segments: queries [S, Q, D], keys and values [S, K, D], output [S, Q, D].

    `scale` is that of the scores q k^T. Query head i reads key head i // (Q // K).
    """
    return _Attention.apply(q, k, v, segments, scale, kernel or choose_kernel(q))  # type: ignore[no-untyped-call,no-any-return]


def choose_kernel(q: Tensor) -> type[Kernel]:
    """torch's flash attention, where the device, the precision and the size of a head allow."""
    if q.device.type == "cpu":
        return FlashOnCPU
    if q.device.type == "cuda" and has_flash(q.dtype, q.shape[-1]):
        return FlashOnCUDA
    return Plain


def has_flash(dtype: torch.dtype, size: int) -> bool:
    """Whether torch's flash attention runs on this CUDA device; on AMD's it was not tried."""
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        return False
    return dtype in (torch.bfloat16, torch.float16) and size % 8 == 0 and size <= 256


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, kernel: type[Kernel]
    ) -> Tensor:
        out, lse, own_rest = kernel.forward(q, k, v, segments.own, scale)
        across_rest: tuple[Any, ...] = ()
        across, first = segments.across, segments.prompt_tokens
        if across is not None:
            seen = slice(across.keys[-1])
            more, more_lse, across_rest = kernel.forward(q[first:], k[seen], v[seen], across, scale)
            both = torch.logaddexp(lse[:, first:], more_lse)
            # The two shares add up to one: o = o_1 + exp(l_2 - l) (o_2 - o_1).
            share = (more_lse - both).exp_().t()[..., None]
            out[first:] = torch.lerp(out[first:].to(share.dtype), more.to(share.dtype), share)
            lse[:, first:] = both
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.of = segments, scale, kernel, own_rest, across_rest
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        segments, scale, kernel, own_rest, across_rest = ctx.of
        grad_q, grad_k, grad_v = kernel.backward(grad, q, k, v, out, lse, segments.own, scale, *own_rest)
        across, first = segments.across, segments.prompt_tokens
        if across is not None:
            seen = slice(across.keys[-1])
            of_whole = out[first:], lse[:, first:].contiguous()
            more_q, more_k, more_v = kernel.backward(
                grad[first:], q[first:], k[seen], v[seen], *of_whole, across, scale, *across_rest
            )
            grad_q[first:] += more_q
            grad_k[seen] += more_k
            grad_v[seen] += more_v
        return grad_q, grad_k, grad_v, None, None, None


class FlashOnCPU:
    """torch's flash attention for CPUs, one call for each pair. See `Kernel`."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs, lses = [], []
        for of_q, of_k in pairs.slices:
            one = (x.transpose(0, 1)[None] for x in (q[of_q], k[of_k], v[of_k]))
            out_1QTD, lse_1QT = run(*one, 0.0, pairs.causal, scale=scale)
            outs.append(out_1QTD[0].transpose(0, 1))
            lses.append(lse_1QT[0])
        return torch.cat(outs), torch.cat(lses, dim=1), ()

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = []
        for of_q, of_k in pairs.slices:
            one = (x.transpose(0, 1)[None] for x in (grad[of_q], q[of_q], k[of_k], v[of_k], out[of_q]))
            grads = run(*one, lse[None, :, of_q], 0.0, pairs.causal, scale=scale)
            found.append([x[0].transpose(0, 1) for x in grads])
        grad_q, grad_k, grad_v = (torch.cat(column) for column in zip(*found, strict=True))
        return grad_q, grad_k, grad_v


class FlashOnCUDA:
    """torch's flash attention for sequences of different lengths, one call for all pairs. See `Kernel`.

    In 16 bits; deterministic where `torch.use_deterministic_algorithms` asks. Not run on a card yet.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        out, lse_QT, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, *pairs.on(q.device), *pairs.longest), 0.0, pairs.causal, False, scale=scale
        )
        assert lse_QT.shape == (q.shape[1], q.shape[0]), f"log-sum-exp {tuple(lse_QT.shape)} of {tuple(q.shape)}"
        return out, lse_QT, (seed, unused)

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            *(grad.contiguous(), q, k, v, out, lse, *pairs.on(q.device), *pairs.longest),
            *(0.0, pairs.causal, *rest),
            scale=scale,
        )
        return found


class Plain:
    """The same in plain operations, with the scores of one pair at a time. See `Kernel`."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        outs, lses = [], []
        for of_q, of_k in pairs.slices:
            q_QTD, k_QUD, v_QUD = _by_head(q.shape[1], q[of_q], k[of_k], v[of_k])
            scores_QTU = _scores(q_QTD, k_QUD, pairs.causal, scale)
            lses.append(scores_QTU.logsumexp(-1))
            outs.append(((scores_QTU - lses[-1][..., None]).exp() @ v_QUD).transpose(0, 1).to(q.dtype))
        return torch.cat(outs), torch.cat(lses, dim=1), ()

    @staticmethod
    def backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = []
        heads, shared = q.shape[1], q.shape[1] // k.shape[1]
        for of_q, of_k in pairs.slices:
            q_QTD, k_QUD, v_QUD, grad_QTD, out_QTD = _by_head(
                heads, *(q[of_q], k[of_k], v[of_k], grad[of_q], out[of_q])
            )
            p_QTU = (_scores(q_QTD, k_QUD, pairs.causal, scale) - lse[:, of_q, None]).exp_()
            slope_QTU = grad_QTD @ v_QUD.transpose(1, 2) - (grad_QTD * out_QTD).sum(-1, keepdim=True)
            slope_QTU.mul_(p_QTU).mul_(scale)
            of_keys = (slope_QTU.transpose(1, 2) @ q_QTD, p_QTU.transpose(1, 2) @ grad_QTD)
            grads = (slope_QTU @ k_QUD, *(x.unflatten(0, (-1, shared)).sum(1) for x in of_keys))
            found.append([x.transpose(0, 1).to(q.dtype) for x in grads])
        grad_q, grad_k, grad_v = (torch.cat(column) for column in zip(*found, strict=True))
        return grad_q, grad_k, grad_v


def _by_head(heads: int, *tensors: Tensor) -> list[Tensor]:
    """[T, Q or K, D] each as [Q, T, D], in float32 at least."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(wide).repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1) for x in tensors]


def _scores(q_QTD: Tensor, k_QUD: Tensor, causal: bool, scale: float) -> Tensor:
    scores_QTU = q_QTD @ k_QUD.transpose(1, 2) * scale
    if causal:
        later = torch.ones(scores_QTU.shape[1:], dtype=torch.bool, device=q_QTD.device).triu(1)
        scores_QTU.masked_fill_(later, -torch.inf)
    return scores_QTU


def _ends(lengths: Sequence[int]) -> tuple[int, ...]:
    """0, and the end of each in turn."""
    return tuple(accumulate(lengths, initial=0))
