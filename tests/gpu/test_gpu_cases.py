"""The checks of tests/gpu/test_gpu.py on a CPU: that they find what is right, and what is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gpu_cases
import pytest
import torch

from dppo_cli.rollout.local import LocalEngine

pytestmark = pytest.mark.usefixtures("work")


@contextmanager
def full() -> Iterator[None]:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    yield


def test_memory_that_runs_out(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_cases.memory_that_runs_out_ends_in_a_line("cpu", model, work / "run", full, monkeypatch, capsys)


def test_equal_commands(model: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_cases.equal_commands_give_equal_tokens("cpu", model, work)
    generate, seeds = LocalEngine.generate, iter(range(100))
    monkeypatch.setattr(LocalEngine, "generate", lambda *args: generate(*args[:-1], next(seeds)))
    with pytest.raises(AssertionError):
        gpu_cases.equal_commands_give_equal_tokens("cpu", model, work / "other")


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_agreement(adapter: str, train_config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_config(f"adapter={adapter}", "sampling.max_new_tokens=8")
    apart, own = gpu_cases.sampler_agrees_with_the_trainer(config, "cpu", "float32")
    assert 0 <= apart < 1e-5 and 0 <= own < 1e-5
    reported = gpu_cases.make.reported

    def off(completions):
        report = reported(completions)
        report.logp_N.add_(0.01)
        return report

    monkeypatch.setattr(gpu_cases.make, "reported", off)
    with pytest.raises(AssertionError, match=r"the trainer's own"):
        gpu_cases.sampler_agrees_with_the_trainer(config, "cpu", "float32")
