"""Memory that nobody needs goes back to the system."""

import sys
from pathlib import Path

import make
import pytest
import torch
from safetensors.torch import load_file, save_file

from dppo_cli.kernels import memory
from dppo_cli.rollout.copies import SamplingCopy


def resident_mib() -> float:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_pieces_go_back_to_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second of many small tensors is freed: holes that a larger one cannot use."""
    if memory._glibc() is None:
        pytest.skip("the C library is not glibc 2.33 or later")
    monkeypatch.setattr(memory, "WORTH_IT", 0)
    memory.return_freed_memory()
    before = resident_mib()
    kept = [torch.ones(16_000) for _ in range(4_000)]  # 64 kB each, 244 MiB
    del kept[::2]
    holes = resident_mib()
    assert holes - before > 120, "some of it may be in holes that were there"
    monkeypatch.setattr(memory, "WORTH_IT", 2**50)
    memory.return_freed_memory()
    assert holes - resident_mib() < 10, "too little to be worth it"
    monkeypatch.setattr(memory, "WORTH_IT", 0)
    memory.return_freed_memory()
    assert holes - resident_mib() > 80
    assert all(float(t.sum()) == 16_000 for t in kept[::500])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_that_rest_leave_memory_and_come_back(tmp_path: Path) -> None:
    """A file's, whole and in part; weights that are no file's stay, for they could only go to swap."""
    written = torch.randn(2, 16_000_000)
    save_file({"a": written[0].clone(), "b": written[1].clone()}, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")
    for name, expected in zip("ab", written, strict=True):
        assert torch.equal(found[name], expected)
    before = resident_mib()
    memory.release_mapped([found["a"], found["b"][:8_000_000]])
    assert 85 < before - resident_mib() < 100, "64 and 32 million bytes less than before, in MiB"
    for name, expected in zip("ab", written, strict=True):
        assert torch.equal(found[name], expected)
    before = resident_mib()
    memory.release_mapped([written])
    assert before - resident_mib() < 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_weights_that_were_written_to_stay(tmp_path: Path) -> None:
    """What is in memory is not what is in the file then."""
    save_file({"a": torch.zeros(20_000_000)}, tmp_path / "weights.safetensors")
    found = load_file(tmp_path / "weights.safetensors")["a"]
    found[12_345_678] = 1.0
    memory.release_mapped([found])
    assert found[12_345_678] == 1.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_base_of_a_sampler_rests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_config) -> None:
    """A real policy's weights are a file's, and the same after they have rested."""
    monkeypatch.setattr(memory, "WORTH_RELEASING", 0)
    policy = make.policy(train_config())
    before = {name: parameter.clone() for name, parameter in policy.model.named_parameters()}
    asked: list[int] = []
    unwritten = memory._unwritten_file_mappings
    monkeypatch.setattr(memory, "_unwritten_file_mappings", lambda: asked.append(1) or unwritten())
    with SamplingCopy(policy.model, torch.float32, merge=True).filled():
        assert asked == [1]
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, before[name]), name
