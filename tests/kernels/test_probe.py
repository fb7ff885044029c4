"""When a kernel is used: it is there, and computes on this device what plain operations compute."""

import importlib
import importlib.util
from collections.abc import Callable

import pytest
import torch

from dppo_cli.kernels.probe import NO_TRITON, refused, without_triton

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU of capability 9.0, and Triton."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", lambda name: object())
    return monkeypatch


def test_where_kernels_are_never_used(hopper: pytest.MonkeyPatch) -> None:
    """Then nothing is said."""
    assert without_triton(CPU, torch.bfloat16) == "" and without_triton(GPU, torch.float32) == ""
    assert without_triton(torch.device("mps"), torch.float16) == ""
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert without_triton(GPU, torch.bfloat16) == ""


def test_where_they_may_be(hopper: pytest.MonkeyPatch) -> None:
    assert without_triton(GPU, torch.bfloat16) is None and without_triton(GPU, torch.float16) is None


def test_no_triton(hopper: pytest.MonkeyPatch) -> None:
    hopper.setattr(importlib.util, "find_spec", lambda name: None)
    assert without_triton(GPU, torch.bfloat16) == NO_TRITON


def test_a_triton_that_cannot_be_imported(hopper: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise ImportError("libtriton.so: wrong ELF class\n more")

    hopper.setattr(importlib, "import_module", broken)
    assert without_triton(GPU, torch.bfloat16) == "Triton cannot be imported: libtriton.so: wrong ELF class"


def raising(error: Exception) -> Callable[[], float]:
    def difference() -> float:
        raise error

    return difference


def test_what_is_refused() -> None:
    assert refused(lambda: 0.25, 0.25) is None
    assert refused(lambda: 0.26, 0.25) == "its results are 0.26 off"
    assert refused(lambda: float("nan"), 0.25) == "its results are nan off"
    assert refused(raising(RuntimeError("no kernel image\n is available")), 0.25) == "no kernel image"
    assert refused(raising(AssertionError()), 0.25) == "AssertionError"
    with pytest.raises(torch.OutOfMemoryError):
        refused(raising(torch.OutOfMemoryError()), 0.25)
