"""The packed layer is the plain one."""

import pytest
import torch

from dppo_cli.rollout.packed import PackedLinear, can_pack


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


def test_what_can_be_packed():
    assert can_pack(torch.device("cpu"), torch.float32)
    assert not can_pack(torch.device("cpu"), torch.bfloat16)
    assert not can_pack(torch.device("cuda"), torch.float32)


def test_a_released_weight_is_gone():
    plain = torch.nn.Linear(24, 40)
    packed = PackedLinear(plain.bias)
    packed.pack(plain.weight.detach())
    packed.release()
    assert packed.packed is None and plain.weight.shape == (40, 24)
