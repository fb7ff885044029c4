"""Memory and work of code that runs on fake tensors."""

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

T = TypeVar("T")
DEVICE = torch.ops.prim.device.default


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes of the tensors that are made, operations, and weights that products decode from 4 bits."""

    flops: float = 0.0
    made: float = 0.0
    operations: float = 0.0
    decoded: float = 0.0

    def times(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.made * factor, self.operations * factor, self.decoded * factor)

    def plus(self, other: "Work") -> "Work":
        return Work(
            self.flops + other.flops,
            self.made + other.made,
            self.operations + other.operations,
            self.decoded + other.decoded,
        )

    def less(self, other: "Work") -> "Work":
        return self.plus(other.times(-1))


class Recorder(TorchDispatchMode):
    """Counts the bytes of tensors made within it, those that are alive and the most at any time, and the work.

    Example: two numbers of 4 bytes, made and then added, are 12 bytes at most, in three operations.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        """`given`: tensors that are there already, of which views may be made; they are not counted."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.flops = self.made = self.operations = self.decoded = 0
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    @property
    def work(self) -> Work:
        return Work(self.flops, self.made, self.operations, self.decoded)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is DEVICE:
            # No operation: torch asks each fake tensor again and again where it is.
            return args[0].fake_device
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            # Nobody knows the value. What asks is, above all, whether a mask is all ones: there is padding.
            return False if args[0].dtype is torch.bool else 0
        found = func(*args, **kwargs)
        self.operations += 1
        self.flops += _flops(func, args, kwargs, found)
        for tensor in [found] if isinstance(found, Tensor) else tree_leaves(found):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return found

    def _count(self, storage: Any) -> None:
        if storage in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage)
        self.live += size
        self.made += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size

    def restart_peak(self) -> int:
        """The most since the last call; what is alive now is where the next one begins."""
        peak, self.peak = self.peak, self.live
        return peak

    def aside(self, run: Callable[[], T]) -> tuple[T, Work]:
        """What `run` gives, and its work, which is not counted."""
        before = self.peak, self.flops, self.made, self.operations, self.decoded
        start = self.work
        found = run()
        work = self.work.less(start)
        self.peak, self.flops, self.made, self.operations, self.decoded = before
        return found, work

    def add(self, work: Work) -> None:
        """Count work that does not run here. What it makes exists all at once, beside what is alive, and is freed."""
        self.flops += int(work.flops)
        self.made += int(work.made)
        self.operations += int(work.operations)
        self.decoded += int(work.decoded)
        self.peak = max(self.peak, self.live + int(work.made))


def _flops(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], found: Any) -> int:
    packet = func._overloadpacket
    if packet is torch.ops.mkldnn._linear_pointwise:
        return int(2 * args[0].numel() * args[1].shape[0])
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=found))
    return 0
