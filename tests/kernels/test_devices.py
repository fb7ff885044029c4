"""What differs between devices, on a machine that has a CPU only: which function of torch is asked."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dppo_cli.kernels import devices

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def settings() -> Any:
    """Left as they were."""
    matmul = torch.backends.cuda.matmul
    before = torch.backends.cuda.cudnn_sdp_enabled(), matmul.allow_bf16_reduced_precision_reduction
    yield lambda: (torch.backends.cuda.cudnn_sdp_enabled(), matmul.allow_bf16_reduced_precision_reduction)
    torch.backends.cuda.enable_cudnn_sdp(before[0])
    matmul.allow_bf16_reduced_precision_reduction = before[1]


def test_settings_are_those_of_cuda(settings: Any) -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    devices.set_up(CPU)
    devices.set_up(MPS)
    assert settings() == (True, True)
    devices.set_up(CUDA)
    assert settings() == (False, False)


@pytest.mark.parametrize(("device", "module"), [(CUDA, "cuda"), (MPS, "mps")])
def test_a_device_has_a_random_state_a_cache_and_a_peak(
    device: torch.device, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    of, asked = getattr(torch, module), []
    monkeypatch.setattr(of, "get_rng_state", lambda *_: torch.tensor([7]))
    monkeypatch.setattr(of, "set_rng_state", lambda state, *_: asked.append(state.tolist()))
    monkeypatch.setattr(of, "empty_cache", lambda: asked.append("emptied"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 11)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 12)
    state = devices.random_state(device)
    devices.set_random_state(device, state)
    devices.empty_cache(device)
    devices.set_random_state(device, None)
    assert asked == [[7], "emptied"]
    assert devices.peak_bytes(device) == {"cuda": 11, "mps": 12}[module]


def test_a_cpu_has_none() -> None:
    assert devices.random_state(CPU) is None and devices.peak_bytes(CPU) is None
    devices.set_random_state(CPU, None)
    devices.empty_cache(CPU)


def test_float64_is_on_the_cpu_where_the_device_has_none() -> None:
    here = torch.tensor([1.5])
    assert devices.float64(here).dtype == torch.float64
    there: Any = SimpleNamespace(device=MPS, cpu=lambda: here)  # has no double()
    assert devices.float64(there).tolist() == [1.5]
