"""What a run was made on."""

import platform

import pytest
import torch

from dppo_cli.training.system import system_facts


def test_a_cpu() -> None:
    found = system_facts(torch.device("cpu"), torch.float32)
    assert (found["device"], found["dtype"]) == ("cpu", "float32")
    assert (found["platform"], found["Python"]) == (platform.platform(), platform.python_version())


def test_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"card {device.index}")
    assert system_facts(torch.device("cuda", 1), torch.bfloat16)["device"] == "cuda:1, card 1"
