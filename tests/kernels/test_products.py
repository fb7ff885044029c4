"""Products with frozen weights are torch's own, to rounding."""

import pytest
import torch

from dppo_cli.kernels import products
from dppo_cli.kernels.products import emulates_bfloat16, has_onednn, has_wide_products, logits_product, multiply


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 24), (70, 24), (3, 33, 24)])
@pytest.mark.parametrize("layout", ["plain", "transposed", "columns"])
def test_same_product(bias, shape, layout):
    torch.manual_seed(0)
    weight, b, x = torch.randn(40, 24), torch.randn(40) if bias else None, torch.randn(shape)
    if layout == "transposed":
        weight = weight.t().contiguous().t()
    elif layout == "columns":
        x = torch.cat([x, x], dim=-1)[..., :24]
    expected = x.double() @ weight.double().t() + (0 if b is None else b.double())
    # Sums of 24 products of size 10 at most, in float32.
    torch.testing.assert_close(multiply(x, weight, b).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_weight_names_the_precision():
    x, weight = torch.randn(5, 24), torch.randn(40, 24).bfloat16()
    assert torch.equal(multiply(x, weight), torch.nn.functional.linear(x.bfloat16(), weight))
    assert multiply(x.bfloat16(), weight.double()).dtype == torch.float64


def test_where_onednn_is_asked():
    assert has_onednn(torch.device("cpu"), torch.float32)
    assert has_onednn(torch.device("cpu"), torch.bfloat16) is torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert not has_onednn(torch.device("cpu"), torch.float64)
    assert not has_onednn(torch.device("cuda"), torch.float32)


def test_where_bfloat16_is_emulated(monkeypatch):
    cpu, bfloat16 = torch.device("cpu"), torch.bfloat16
    assert emulates_bfloat16(cpu, bfloat16) is not has_onednn(cpu, bfloat16)
    monkeypatch.setattr(products, "has_onednn", lambda *_: False)
    assert emulates_bfloat16(cpu, bfloat16)
    assert not emulates_bfloat16(cpu, torch.float32)
    assert not emulates_bfloat16(torch.device("cuda"), bfloat16)


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_onednn_multiplies_except_transposed_weights_without_avx512(monkeypatch, capability, layout):
    asked = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "onednn_linear", lambda *_: asked.append(True))
    weight = torch.randn(40, 24)
    multiply(torch.randn(5, 24), weight if layout == "plain" else weight.t().contiguous().t())
    assert bool(asked) is ((capability, layout) != ("AVX2", "transposed"))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24)])
def test_logits_are_not_rounded_where_torch_multiplies_into_float32(monkeypatch, shape, bias):
    """torch has this product on CUDA only; the test computes it as CUDA does."""
    torch.manual_seed(0)
    weight, x = torch.randn(40, 24).bfloat16(), torch.randn(shape)
    b = torch.randn(40).bfloat16() if bias else None
    rounded = logits_product(x, weight, b)
    assert torch.equal(rounded, multiply(x, weight, b)) and rounded.dtype == torch.bfloat16
    calls = []

    def mm(a, b, out_dtype):
        calls.append((a.dtype, b.dtype, out_dtype, a.shape, b.shape))
        return a.float() @ b.float()

    monkeypatch.setattr(products, "has_wide_products", lambda *_: True)
    monkeypatch.setattr(torch, "mm", mm)
    found = logits_product(x, weight, b)
    rows = x.numel() // 24
    assert calls == [(torch.bfloat16, torch.bfloat16, torch.float32, (rows, 24), (24, 40))]
    expected = x.bfloat16().double() @ weight.double().t() + (0 if b is None else b.double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert (rounded.double() - expected).abs().max() > 100 * (found.double() - expected).abs().max()


def test_where_products_are_wider_than_their_factors(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert has_wide_products(cuda, torch.bfloat16) and has_wide_products(cuda, torch.float16)
    assert not has_wide_products(cuda, torch.float32) and not has_wide_products(cpu, torch.bfloat16)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not has_wide_products(cuda, torch.bfloat16)
