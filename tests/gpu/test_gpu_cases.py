"""The checks of tests/gpu/test_gpu.py on a CPU: that they find what is right, and what is not."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gpu_cases
import pytest
import torch

from dppo_cli.kernels.segment_kernels import FlashOnCPU
from dppo_cli.policy.packed_forward import PackedGroups
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


@pytest.mark.parametrize("words", [(), ("hardware.gradient_checkpointing=true",)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_packed_updates(adapter: str, words: tuple[str, ...], train_config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_config(f"adapter={adapter}", *gpu_cases.UNMASKED, *words)
    apart, own = gpu_cases.packed_updates_agree_with_whole_sequences(config, "cpu", "float32")
    assert 0 < apart < 1e-4 and 0 < own < 1e-4
    states = PackedGroups.predicting_states
    monkeypatch.setattr(PackedGroups, "predicting_states", lambda *args: 1.001 * states(*args))
    with pytest.raises(AssertionError, match=r"whole sequences' own"):
        gpu_cases.packed_updates_agree_with_whole_sequences(config, "cpu", "float32")


def test_attention_over_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    check = gpu_cases.attention_over_segments_agrees_with_plain_operations
    assert 0 < check("cpu", torch.float32, FlashOnCPU) < 1e-5
    backward = FlashOnCPU.backward
    monkeypatch.setattr(FlashOnCPU, "backward", staticmethod(lambda *args: [1.001 * x for x in backward(*args)]))
    with pytest.raises(AssertionError, match="relative error"):
        check("cpu", torch.float32, FlashOnCPU)
