"""The checks of fused_cases.py on a CPU: that they find what is right, and what is not."""

import fused_cases
import gpu_cases
import interpreted
import pytest
import tiny_models
import torch

swiglu = interpreted.kernels("gated")
layers = interpreted.kernels("layers")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = fused_cases.kernels_are_as_exact_as_plain_operations("cpu", dtype, tokens=3)
    assert len(found) == 14 and all(0 <= share < 0.01 for share in found.values())
    right = swiglu.swiglu
    monkeypatch.setattr(swiglu, "swiglu", lambda gate, up: 1.01 * right(gate, up))
    with pytest.raises(AssertionError, match=r"gate of 4864: error 0\.01"):
        fused_cases.kernels_are_as_exact_as_plain_operations("cpu", dtype, tokens=3)


@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_modules(model: str, train_config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo_cli.kernels.fuse.without_triton", lambda *_: None)
    monkeypatch.setattr(layers, "DEVICES", ("cpu",))
    assert fused_cases.modules_agree_with_plain_ones(train_config(model=model), "cpu", "bfloat16", (2, 5)) < 0.01
    right = layers.swiglu

    def off(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        # The probe's own comes through.
        return right(gate, up) * (1.1 if gate.shape[-1] == 64 else 1.0)

    monkeypatch.setattr(layers, "swiglu", off)
    with pytest.raises(AssertionError, match="from plain modules"):
        fused_cases.modules_agree_with_plain_ones(train_config(model=model), "cpu", "bfloat16", (2, 5))
    monkeypatch.setattr("dppo_cli.kernels.fuse.without_triton", lambda *_: "")
    with pytest.raises(AssertionError, match="the model has the kernels"):
        fused_cases.modules_agree_with_plain_ones(train_config(model=model), "cpu", "bfloat16", (2, 5))


@pytest.mark.parametrize("family", ["phi3", "smollm3", "olmo2", "gemma3"])
def test_modules_of_more_families(family: str, train_config, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo_cli.kernels.fuse.without_triton", lambda *_: None)
    monkeypatch.setattr(layers, "DEVICES", ("cpu",))
    config = train_config(f"model.path={tiny_models.save(tmp_path / family, family)}")
    assert fused_cases.modules_agree_with_plain_ones(config, "cpu", "bfloat16", (2, 5)) < 0.001


@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_sampling(model: str, train_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampler and trainer, each with the kernels, agree as without."""
    monkeypatch.setattr("dppo_cli.kernels.fuse.without_triton", lambda *_: None)
    monkeypatch.setattr(layers, "DEVICES", ("cpu",))
    stepped, add_and_norm = [], layers.add_and_norm
    monkeypatch.setattr(layers, "add_and_norm", lambda *of: stepped.append(len(of[0])) or add_and_norm(*of))
    config = train_config("rollout.weights=adapter", "sampling.max_new_tokens=5", model=model)
    gpu_cases.sampler_agrees_with_the_trainer(config, "cpu", "bfloat16")
    assert len(stepped) > 10, "the sampler's steps have the kernels"
