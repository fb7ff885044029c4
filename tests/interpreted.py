"""Kernels on the CPU by Triton's interpreter, with casts to bfloat16 that round to the nearest, as GPUs do.

The interpreter's own casts cut the lower bits off, and its products take bfloat16 for integers. Numbers that a kernel
has read cannot bound its loops there, if numpy makes no number of an array of one.
"""

import importlib
from typing import Any

import numpy as np
import pytest
import torch


def kernels(name: str) -> Any:
    """A module of `dppo_cli.kernels.fused`. The tests of the calling module are skipped where it cannot run."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("a GPU runs the kernels here, see tests/gpu", allow_module_level=True)
    _mend()
    return importlib.import_module(f"dppo_cli.kernels.fused.{name}")


def _mend() -> None:
    from triton.runtime import interpreter

    plain = interpreter._convert_float
    if plain.__module__ == __name__:
        return

    def convert(values, source, target, rounding):
        if (source.name, target.name) != ("fp32", "bf16"):
            return plain(values, source, target, rounding)
        exact = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
        return exact.bfloat16().view(torch.int16).numpy().view(np.uint16)

    def dot(self, a, b, d, *how):
        a, b = (_widened(x) for x in (a, b))
        return plain_dot(self, a, b, d, *how)

    def _widened(x):
        if x.dtype.scalar.name != "bf16":
            return x
        exact = torch.from_numpy(np.ascontiguousarray(x.data).view(np.int16)).view(torch.bfloat16)
        return interpreter.TensorHandle(exact.float().numpy(), interpreter.tl.float32)

    def patch_tensor(tensor, scope):
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    plain_patch, interpreter._patch_lang_tensor = interpreter._patch_lang_tensor, patch_tensor
    plain_dot = interpreter.InterpreterBuilder.create_dot
    interpreter.InterpreterBuilder.create_dot = dot
    interpreter._convert_float = convert
