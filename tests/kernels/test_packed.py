"""The packed layer is the plain one."""

import pytest
import torch

from dppo_cli.kernels.packed import PackedLinear, Siblings
from dppo_cli.kernels.products import has_onednn

BFLOAT16 = has_onednn(torch.device("cpu"), torch.bfloat16)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 24), (5, 24), (3, 70, 24)])
def test_same_product(bias, shape):
    torch.manual_seed(0)
    plain = torch.nn.Linear(24, 40, bias=bias)
    packed = PackedLinear(plain.bias)
    packed.pack(plain.weight.detach())
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(packed(x), plain(x), rtol=1e-5, atol=1e-6)
        packed.pack(2 * plain.weight)
        torch.testing.assert_close(packed(x) - plain(x), x @ plain.weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not BFLOAT16, reason="the processor has no bfloat16")
@pytest.mark.parametrize("biases", [(True, False), (False, False)])
def test_same_product_in_bfloat16(biases):
    """Summed in float32 and rounded once."""
    torch.manual_seed(0)
    plain = [torch.nn.Linear(24, n, bias=bias).bfloat16() for n, bias in zip((40, 8), biases, strict=True)]
    siblings = Siblings([40, 8], [m.bias for m in plain])
    siblings.linear.pack(torch.cat([m.weight.detach() for m in plain]))
    x = torch.randn(70, 24).bfloat16()
    for member, layer in zip(siblings.members, plain, strict=True):
        found, expected = member(x), layer.double()(x.double())
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)


def test_a_released_weight_is_gone():
    plain = torch.nn.Linear(24, 40)
    packed = PackedLinear(plain.bias)
    packed.pack(plain.weight.detach())
    packed.release()
    assert packed.packed is None and plain.weight.shape == (40, 24)


@pytest.mark.parametrize("biases", [(True, True, True), (False, False, False), (True, False, True)])
def test_siblings_are_the_layers_they_replace(biases):
    """However they are called: in any order, more than once, with another input, with one that was written to."""
    torch.manual_seed(0)
    plain = [torch.nn.Linear(24, n, bias=bias) for n, bias in zip((40, 8, 16), biases, strict=True)]
    siblings = Siblings([m.out_features for m in plain], [m.bias for m in plain])
    siblings.linear.pack(torch.cat([m.weight.detach() for m in plain]))
    a, b = torch.randn(5, 24), torch.randn(3, 1, 24)
    with torch.no_grad():
        for x, member in [(a, 0), (a, 1), (a, 2), (a, 0), (b, 2), (a, 1), (b, 0), (b, 0), (b, 1), (b, 1)]:
            found = siblings.members[member](x)
            torch.testing.assert_close(found, plain[member](x), rtol=1e-5, atol=1e-6)
        for _ in range(2):
            for member in (0, 1, 2):
                torch.testing.assert_close(siblings.members[member](a), plain[member](a), rtol=1e-5, atol=1e-6)
            a.mul_(2)


def test_siblings_are_multiplied_at_once():
    plain = [torch.nn.Linear(24, n, bias=False) for n in (40, 8)]
    siblings = Siblings([40, 8], [None, None])
    siblings.linear.pack(torch.cat([m.weight.detach() for m in plain]))
    products = []
    siblings.linear.register_forward_hook(lambda *_: products.append(1))
    x = torch.randn(2, 24)
    first, second = (member(x) for member in siblings.members)
    assert (first.shape, second.shape, len(products)) == ((2, 40), (2, 8), 1)
    assert siblings.input is None, "nothing of a finished step is held"
