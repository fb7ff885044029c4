"""The checks of tests/gpu/test_gpu_nf4.py in Triton's interpreter: that they find what is right, and what is not."""

from pathlib import Path

import decode_cases
import interpreted
import make
import nf4_cases
import pytest
import tiny_models
import torch

from dppo_cli.config.sections import Sampling
from dppo_cli.kernels import beside
from dppo_cli.rollout.engine import in_order

nf4_product = interpreted.kernels("nf4_product")


def test_products(monkeypatch: pytest.MonkeyPatch) -> None:
    of = ("cpu", torch.bfloat16, (72, 64), 64, (1, 17))
    found = nf4_cases.products_are_as_exact_as_bitsandbytes(*of)
    assert all(0 < apart <= 1.02 * own for apart, own in found.values())
    scales = nf4_product.scales_of
    monkeypatch.setattr(nf4_product, "scales_of", lambda state: scales(state) * 1.01)
    with pytest.raises(AssertionError, match="1 rows: mean error"):
        nf4_cases.products_are_as_exact_as_bitsandbytes(*of)


def test_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    nf4_cases.weights_are_decoded_bit_for_bit("cpu", torch.bfloat16, 64, 128)
    scales = nf4_product.scales_of
    monkeypatch.setattr(nf4_product, "scales_of", lambda state: scales(state) * 1.001)
    with pytest.raises(AssertionError):
        nf4_cases.weights_are_decoded_bit_for_bit("cpu", torch.bfloat16, 64, 128)


def test_static_steps(train_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling by the kernel, against sampling by bitsandbytes."""
    folder = tiny_models.save(tmp_path / "qwen2", "qwen2", **tiny_models.BLOCKS)
    of = decode_cases.policy(train_config("adapter=qlora", f"model.path={folder}"), "cpu", "bfloat16")
    monkeypatch.setattr(beside, "without_triton", lambda *_: None)
    how, launches, launch = Sampling(0.7, 1.0, 0, 0.0, 6, []), [], nf4_product.Nf4Product.__call__

    def counted(self, *of):
        launches.append(len(self.sizes))
        return launch(self, *of)

    monkeypatch.setattr(nf4_product.Nf4Product, "__call__", counted)

    def sampled(static: bool):
        with decode_cases.opened(of, "quantized") as engine:
            engine.sync(0)
            if not static:
                engine.refilling = None
            return make.flat(in_order(engine.generate(make.prompts(of), 2, how, 0, seed=3)))

    ours = sampled(True)
    # In two layers of each step; four times in `difference`, if this is the first test that needs it.
    steps = launches.count(3) // 2
    assert steps > 4 and launches.count(1) == 2 * launches.count(3) and launches.count(2) - launches.count(3) in (0, 4)
    before, plain = len(launches), sampled(False)
    assert len(launches) == before
    equal = [(a, b) for a, b in zip(ours, plain, strict=True) if a.token_ids_T.tolist() == b.token_ids_T.tolist()]
    assert len(equal) >= len(ours) // 2
    assert all(float((a.mu.logp_N - b.mu.logp_N).abs().max()) < 0.3 for a, b in equal)


def test_the_sampler(train_config, tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "llama", "llama", **tiny_models.BLOCKS)
    words = ("adapter=qlora", "rollout.weights=quantized", f"model.path={folder}")
    apart, _, launches = nf4_cases.sampler_agrees_with_the_trainer(train_config(*words), "cpu", "float32")
    assert apart <= 1e-5 and launches == 0
