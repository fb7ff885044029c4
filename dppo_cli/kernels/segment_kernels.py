"""Attention of pairs of stretches, and its backward pass, by torch's flash attention or in plain operations.

Shapes: Q query heads, K key heads, D head size; T queries and U keys of a pair, or of all of them.
"""

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.probe import apart, refused

CLOSE = 0.02
"""Differences from plain operations that are rounding in 16 bits, relative to the largest number."""
TRIED = 128
"""Sizes of heads up to which torch's kernel was tried on a card, without windows."""


@dataclass(frozen=True)
class Pairs:
    """Where the queries of each attention end that is computed by itself, and where its keys; both begin with 0.

    `causal`: the last query sees all keys, the one before all but the last, and so on; with a `window`, so many of them
    at most, and its own key among these.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    causal: bool
    window: int | None = None

    @cached_property
    def slices(self) -> list[tuple[slice, slice]]:
        return [(slice(*q), slice(*k)) for q, k in zip(pairwise(self.queries), pairwise(self.keys), strict=True)]

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Queries and keys."""
        return tuple(max(b - a for a, b in pairwise(ends)) for ends in (self.queries, self.keys))  # type: ignore[return-value]

    def seen(self, of_q: slice, of_k: slice, device: torch.device) -> Tensor | None:
        """Of one of them, bool [T, U]: the keys that its queries see; None: all, or causally as many as there are."""
        count, keys = of_q.stop - of_q.start, of_k.stop - of_k.start
        if not self.causal or (count == keys and (self.window is None or keys <= self.window)):
            return None
        ahead_TU = torch.arange(keys, device=device) - torch.arange(keys - count, keys, device=device)[:, None]
        return (ahead_TU <= 0) & (ahead_TU > -(self.window or keys))

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


def choose_kernel(q: Tensor, key_heads: int, window: int | None = None) -> type[Kernel]:
    """torch's flash attention, where the device, the precision and the size of a head allow."""
    if q.device.type == "cpu":
        return FlashOnCPU
    if q.device.type == CUDA and why_not_flash(q.dtype, q.shape[1], key_heads, q.shape[2], window is not None) is None:
        return FlashOnCUDA
    return Plain


def why_not_flash(dtype: torch.dtype, heads: int, key_heads: int, size: int, windows: bool) -> str | None:
    """Why torch's flash attention is not used on the CUDA device: empty where it is not made for it, else in words.

    With windows, or large heads, it is compared with plain operations before it is used. On AMD's cards it was not
    tried.
    """
    if dtype not in (torch.bfloat16, torch.float16) or size % 8 != 0 or size > 256:
        return ""
    if torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0):
        return ""
    return _refused(dtype, heads, key_heads, size, windows) if windows or size > TRIED else None


@cache
def _refused(dtype: torch.dtype, heads: int, key_heads: int, size: int, windows: bool) -> str | None:
    of = torch.device(CUDA), dtype, heads, key_heads, size, windows
    return refused(lambda: difference(FlashOnCUDA, *of), CLOSE)


@torch.no_grad()
def difference(
    kernel: type[Kernel], device: torch.device, dtype: torch.dtype, heads: int, key_heads: int, size: int, windows: bool
) -> float:
    """The largest difference of output, log-sum-exp and gradients from plain operations in float32.

    Relative to the largest number of each, for pairs as `segments` makes them.
    """
    queries, keys = (0, 70, 71, 171), (0, 70, 110, 240)
    tried = [Pairs(queries, keys, causal=True, window=40)]
    if not windows:
        tried = [Pairs(queries, queries, causal=True), Pairs(queries, keys, causal=False)]
    generator = torch.Generator().manual_seed(0)

    def random(tokens: int, count: int) -> Tensor:
        return torch.randn(tokens, count, size, generator=generator).to(device, dtype)

    def results(of: type[Kernel], pairs: Pairs, given: list[Tensor]) -> list[Tensor]:
        grad, q, k, v = given
        out, lse, rest = of.forward(q, k, v, pairs, size**-0.5)
        return [out, lse, *of.backward(grad, q, k, v, out, lse, pairs, size**-0.5, *rest)]

    both: list[tuple[Tensor, Tensor]] = []
    for pairs in tried:
        # A gradient and queries, keys and values.
        tokens = [(pairs.queries[-1], heads)] * 2 + [(pairs.keys[-1], key_heads)] * 2
        given = [random(*shape) for shape in tokens]
        both += zip(results(kernel, pairs, given), results(Plain, pairs, [x.float() for x in given]), strict=True)
    return apart(both)


class FlashOnCPU:
    """torch's flash attention for CPUs, one call for each pair. See `Kernel`."""

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs, lses = [], []
        for of_q, of_k in pairs.slices:
            one = (x.transpose(0, 1)[None] for x in (q[of_q], k[of_k], v[of_k]))
            mask = _mask(pairs, of_q, of_k, q)
            out_1QTD, lse_1QT = run(*one, 0.0, pairs.causal and mask is None, attn_mask=mask, scale=scale)
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
            mask = _mask(pairs, of_q, of_k, q)
            causal = pairs.causal and mask is None
            grads = run(*one, lse[None, :, of_q], 0.0, causal, attn_mask=mask, scale=scale)
            found.append([x[0].transpose(0, 1) for x in grads])
        grad_q, grad_k, grad_v = (torch.cat(column) for column in zip(*found, strict=True))
        return grad_q, grad_k, grad_v


class FlashOnCUDA:
    """torch's flash attention for sequences of different lengths, one call for all pairs. See `Kernel`.

    In 16 bits; deterministic where `torch.use_deterministic_algorithms` asks.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        out, lse_QT, seed, unused, _ = torch.ops.aten._flash_attention_forward(
            *(q, k, v, *pairs.on(q.device), *pairs.longest), 0.0, pairs.causal, False, scale=scale, **_window(pairs)
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
            **_window(pairs),
        )
        return found


class Plain:
    """The same in plain operations, with the scores of one pair at a time. See `Kernel`.

    Without autocast, which would round its factors, and in one of the two passes alone.
    """

    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        outs, lses = [], []
        with torch.autocast(q.device.type, enabled=False):
            for of_q, of_k in pairs.slices:
                q_QTD, k_QUD, v_QUD = _by_head(q.shape[1], q[of_q], k[of_k], v[of_k])
                scores_QTU = _scores(q_QTD, k_QUD, pairs, of_q, of_k, scale)
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
            p_QTU = (_scores(q_QTD, k_QUD, pairs, of_q, of_k, scale) - lse[:, of_q, None]).exp_()
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


def _scores(q_QTD: Tensor, k_QUD: Tensor, pairs: Pairs, of_q: slice, of_k: slice, scale: float) -> Tensor:
    scores_QTU = q_QTD @ k_QUD.transpose(1, 2) * scale
    seen_TU = pairs.seen(of_q, of_k, q_QTD.device)
    if seen_TU is None and pairs.causal:
        seen_TU = torch.ones(scores_QTU.shape[1:], dtype=torch.bool, device=q_QTD.device).tril()
    return scores_QTU if seen_TU is None else scores_QTU.masked_fill_(~seen_TU, -torch.inf)


def _mask(pairs: Pairs, of_q: slice, of_k: slice, q: Tensor) -> Tensor | None:
    """What is added to the scores, where they are not those of all keys, or causal ones of as many keys as queries."""
    seen_TU = pairs.seen(of_q, of_k, q.device)
    return None if seen_TU is None else torch.zeros_like(seen_TU, dtype=q.dtype).masked_fill_(~seen_TU, -torch.inf)


def _window(pairs: Pairs) -> dict[str, int]:
    """Keys before a query's own one, and after it."""
    return {} if pairs.window is None else {"window_size_left": pairs.window - 1, "window_size_right": 0}
