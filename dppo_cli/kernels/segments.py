"""Attention over prompts and their responses in one row of tokens, without padding and without a mask.

A response's token attends to its prompt and, causally, to its own response. Each of the two is an attention of its own,
with output o and log-sum-exp l of its scores; together they are, exactly,
    l = log(exp(l_1) + exp(l_2)),  o = exp(l_1 - l) o_1 + exp(l_2 - l) o_2.
Going back, each part gets the gradient of the whole from o and l of the whole, because a score's probability is
exp(score - l) in either (arXiv 2205.14135, appendix B.4); what both ask of a query, key or value is added up.

In layers with a window that some sequence passes, where a response's keys begin depends on the query. There each
response is one attention, to copies of the keys of its prompt that its first token sees, and to its own.

Shapes: S tokens of the row, Q query heads, K key heads, D head size; T tokens of a segment.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from dppo_cli.kernels.segment_kernels import Kernel, Pairs, choose_kernel


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

    @cached_property
    def longest(self) -> int:
        """Tokens of a prompt with a response to it."""
        return max(prompt + max(of, default=0) for prompt, of in zip(self.prompts, self.responses, strict=True))

    def seen_through(self, window: int) -> "Windowed":
        if window not in self._windowed:
            self._windowed[window] = Windowed(self, window)
        return self._windowed[window]

    @cached_property
    def _windowed(self) -> dict[int, "Windowed"]:
        return {}


class Windowed:
    """Where the keys of each segment are if every response has copies of those of its prompt that a window shows.

    `pairs`: of each segment with these keys, which are `keys_X` of the row's. `own_S`: which of them are not copies.
    `copies`: of each prompt, where the copied keys are in the row, and where the copies are, [responses, tokens].
    """

    def __init__(self, segments: Segments, window: int) -> None:
        parts, own, ends = [], [], [0]
        self.copies: list[tuple[slice, Tensor]] = []
        start = 0

        def add(first: int, count: int) -> Tensor:
            parts.append(torch.arange(first, first + count))
            ends[-1] += count
            return torch.arange(ends[-1] - count, ends[-1])

        def end() -> None:
            ends.append(ends[-1])

        for prompt in segments.prompts:
            own.append(add(start, prompt))
            end()
            start += prompt
        prompts_end = 0
        for prompt, responses in zip(segments.prompts, segments.responses, strict=True):
            prompts_end += prompt
            tail = min(prompt, window - 1)
            copies = []
            for response in responses:
                copies.append(add(prompts_end - tail, tail))
                own.append(add(start, response))
                end()
                start += response
            if copies and tail:
                self.copies.append((slice(prompts_end - tail, prompts_end), torch.stack(copies)))
        self.pairs = Pairs(segments.own.queries, (0, *ends[:-1]), causal=True, window=window)
        self.keys_X, self.own_S = torch.cat(parts), torch.cat(own)

    def to(self, device: torch.device) -> "Windowed":
        if self.keys_X.device != device:
            self.keys_X, self.own_S = self.keys_X.to(device), self.own_S.to(device)
            self.copies = [(of, at.to(device)) for of, at in self.copies]
        return self

    def summed(self, grad_XKD: Tensor) -> Tensor:
        """[S, K, D]: of each key of the row, what is asked of it and of its copies; in a fixed order."""
        total_SKD = grad_XKD.index_select(0, self.own_S)
        for of, at in self.copies:
            total_SKD[of] += grad_XKD.index_select(0, at.flatten()).unflatten(0, at.shape).sum(0)
        return total_SKD


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Segments,
    scale: float,
    kernel: type[Kernel] | None = None,
    window: int | None = None,
) -> Tensor:
    """Attention over a row of segments: queries [S, Q, D], keys and values [S, K, D], output [S, Q, D].

    `scale` is that of the scores q k^T. Query head i reads key head i // (Q // K). `window`: how many positions of its
    sequence a token sees, its own among them; None: all.
    """
    if window is not None and window >= segments.longest:
        window = None
    kernel = kernel or choose_kernel(q, k.shape[1], window)
    if window is None:
        return _Attention.apply(q, k, v, segments, scale, kernel)  # type: ignore[no-untyped-call,no-any-return]
    through = segments.seen_through(window).to(q.device)
    return _WindowAttention.apply(q, k, v, through, scale, kernel)  # type: ignore[no-untyped-call,no-any-return]


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, through: Windowed, scale: float, kernel: type[Kernel]
    ) -> Tensor:
        keys, values = (x.index_select(0, through.keys_X) for x in (k, v))
        out, lse, rest = kernel.forward(q, keys, values, through.pairs, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.of = through, scale, kernel, rest
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        through, scale, kernel, rest = ctx.of
        keys, values = (x.index_select(0, through.keys_X) for x in (k, v))
        grad_q, grad_k, grad_v = kernel.backward(grad, q, keys, values, out, lse, through.pairs, scale, *rest)
        return grad_q, through.summed(grad_k), through.summed(grad_v), None, None, None


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


def _ends(lengths: Sequence[int]) -> tuple[int, ...]:
    """0, and the end of each in turn."""
    return tuple(accumulate(lengths, initial=0))
