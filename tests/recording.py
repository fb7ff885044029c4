"""A CUDA graph on a CPU: what a function computed with which tensors is recorded, and computed again."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Operations, their arguments and results. As in a graph, numbers are recorded, and tensors by where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for function, args, kwargs, before in self.done:
            own = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            after = function(*args, **kwargs)
            for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                # A view, or what was changed in place, is right where it is.
                if isinstance(old, Tensor) and _storage(old) not in own:
                    old.copy_(new)


class RecordedGraphs:
    """Takes the place of `Graphs`. `calls`: of each key."""

    def __init__(self) -> None:
        self.recorded: dict[Hashable, Recorder] = {}
        self.calls: dict[Hashable, int] = {}

    def __call__(self, key: Hashable, function: Callable[[], None]) -> None:
        self.calls[key] = self.calls.get(key, 0) + 1
        if key in self.recorded:
            self.recorded[key].replay()
            return
        with Recorder() as recorder:
            function()
        self.recorded[key] = recorder

    def release(self) -> None:
        self.recorded.clear()


def _storage(tensor: Tensor) -> int:
    # oneDNN's packed weights have none.
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)


def addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]
