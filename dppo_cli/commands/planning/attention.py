"""Attention over segments in a plan: pairs of equal lengths are many, so one of them runs and counts for all.

Shapes: as in kernels/segments.py.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from dppo_cli.commands.planning.recorder import Recorder, Work
from dppo_cli.kernels.segment_kernels import FlashOnCPU, Pairs
from dppo_cli.policy.packed_forward import attention


class PairsAlike:
    """A `Kernel` with the memory and the work of `FlashOnCPU`, which calls an operation for each pair.

    A plan of the default run makes 100,000 operations for them, 5,000 without. On a GPU one call computes all pairs and
    makes nothing but the results, so that there the FLOPs alone are counted as often as there are pairs.
    """

    def __init__(self, recorder: Recorder, on_cpu: bool) -> None:
        self.recorder, self.on_cpu = recorder, on_cpu
        self.costs: dict[Any, Work] = {}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, scale: float) -> tuple[Tensor, Tensor, tuple[()]]:
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        self._add("forward", lambda one: FlashOnCPU.forward(q, k, v, one, scale)[:2], q, k, pairs)
        return out, lse, ()

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, pairs: Pairs, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        self._add("backward", lambda one: FlashOnCPU.backward(grad, q, k, v, out, lse, one, scale), q, k, pairs)
        return found

    def _add(self, name: str, run: Callable[[Any], Sequence[Tensor]], q: Tensor, k: Tensor, pairs: Pairs) -> None:
        alike: dict[tuple[int, int], list[tuple[slice, slice]]] = {}
        for of_q, of_k in pairs.slices:
            alike.setdefault((of_q.stop - of_q.start, of_k.stop - of_k.start), []).append((of_q, of_k))
        total = Work()
        for lengths, same in alike.items():
            key = name, lengths, pairs.causal, pairs.window, q.shape[1:], k.shape[1:], q.dtype
            if key not in self.costs:
                one = SimpleNamespace(slices=same[:1], causal=pairs.causal, seen=pairs.seen)
                results, work = self.recorder.aside(lambda one=one: run(one))  # type: ignore[misc]
                # The results of all pairs, each one operation, are counted where they are made.
                made, count = sum(x.nbytes for x in results), len(results)
                self.costs[key] = work.less(Work(made=made, operations=count))
                del results
            total = total.plus(self.costs[key].times(len(same)))
        self.recorder.add(total if self.on_cpu else Work(flops=total.flops))


@contextmanager
def counted_attention(recorder: Recorder, on_cpu: bool) -> Iterator[None]:
    """Within it, models compute attention over segments by `PairsAlike`."""
    AttentionInterface.register("sdpa", partial(attention, kernel=PairsAlike(recorder, on_cpu)))
    try:
        yield
    finally:
        AttentionInterface.register("sdpa", attention)
