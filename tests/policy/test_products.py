"""Products with frozen weights are torch's own, to rounding."""

import pytest
import torch

from dppo_cli.policy import products
from dppo_cli.policy.products import has_onednn, multiply


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


@pytest.mark.parametrize("layout", ["plain", "transposed"])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_whose_product_it_is(monkeypatch, capability, layout):
    """oneDNN's, but for transposed weights without AVX-512."""
    asked = []
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "onednn_linear", lambda *_: asked.append(True))
    weight = torch.randn(40, 24)
    multiply(torch.randn(5, 24), weight if layout == "plain" else weight.t().contiguous().t())
    assert bool(asked) is ((capability, layout) != ("AVX2", "transposed"))
