"""What is read of bitsandbytes' layers, and which of them the kernel refuses."""

import four_bit_layers
import pytest
import torch
from four_bit_layers import layer
from torch import nn

from dppo_cli.kernels.four_bits import BLOCK, biases_of, is_4_bit, scales_of, why_not

HALF = torch.bfloat16


def test_which_layers_are_4_bit():
    assert is_4_bit(layer(8, 64)) and not is_4_bit(nn.Linear(2, 2))


@pytest.mark.parametrize("double", [False, True])
def test_scales_are_those_of_dequantising(double):
    of = layer(16, 128, torch.float32, double=double)
    scale = scales_of(of.weight.quant_state)
    blocks = four_bit_layers.dequantised(of).view(-1, BLOCK)
    assert scale.dtype == torch.float32 and scale.shape == (32,)
    # Each block but that of zeros has a weight of the code 1 or -1.
    torch.testing.assert_close(scale[1:], blocks.abs().amax(1)[1:], rtol=0, atol=0)


def test_biases():
    with_bias = layer(8, 64, bias=True)
    assert biases_of([layer(8, 64)]) is None
    found = biases_of([layer(4, 64), with_bias])
    assert found is not None and torch.equal(found, torch.cat([torch.zeros(4, dtype=HALF), with_bias.bias]))


@pytest.mark.parametrize(
    ("of", "said"),
    [
        (lambda: layer(8, 64, quant_type="fp4"), "its weights are in fp4, not nf4"),
        (lambda: layer(8, 64, quant_storage=torch.bfloat16), "its codes are stored as bfloat16, not uint8"),
        (lambda: layer(8, 128, blocksize=128), "a scale belongs to 128 weights, not 64"),
        (lambda: layer(8, 96), "it has 96 inputs, no multiple of 64"),
        (lambda: layer(12, 64), "it has 12 outputs, no multiple of 8"),
        (lambda: layer(8, 64, torch.float32), "it is made for float32"),
    ],
)
def test_what_the_kernel_refuses(of, said):
    assert why_not(of(), HALF) == said


def test_what_it_computes():
    assert why_not(layer(8, 192), HALF) is None
    assert why_not(layer(8, 192, torch.float16), torch.float16) is None
    packed = layer(8, 64)
    packed.weight.quant_state.packing_format_for_cpu = True
    assert why_not(packed, HALF) == "its weights are not quantised, or packed for a CPU"
