"""The gate's kernels against plain operations, and their gradients against float64."""

import interpreted
import pytest
import torch
from torch.nn.functional import gelu, silu

fused = interpreted.kernels("gated")
swiglu, geglu = fused.swiglu, fused.geglu
HALVES = (torch.bfloat16, torch.float16)
SHAPES = ((3, 2, 48), (2, 4864), (5, 1), (0, 8), (2, 0, 8))


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def plain(gate, up):
    return silu(gate) * up


def plain_gelu(gate, up):
    return gelu(gate, approximate="tanh") * up


both = pytest.mark.parametrize(("run", "plain"), [(swiglu, plain), (geglu, plain_gelu)], ids=["swiglu", "geglu"])


def with_gradients(run, gate, up, grad):
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    out = run(gate, up)
    return [out.detach(), *torch.autograd.grad(out, (gate, up), grad)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@both
def test_bits_are_those_of_plain_operations(run, plain, shape, dtype):
    gate, up, grad = (random(*shape, seed=seed).to(dtype) for seed in range(3))
    gate *= 4
    expected, found = (with_gradients(each, gate, up, grad) for each in (plain, run))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.is_contiguous() and a.shape == b.shape
        # Another exp may round to the neighbour, of one number in thousands. torch's tanh loses the smallest of gelu.
        small = 1e-6 if run is swiglu else 3e-5
        assert int(((a.float() - b.float()).abs() > (run is geglu) * small).sum()) <= a.numel() // 1000
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=small)
    torch.testing.assert_close(run(gate, up), found[0], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:overflow")
def test_the_ends_of_the_range():
    gate = torch.tensor([[-3e38, -100.0, -20.0, 0.0, 20.0, 1e38]]).bfloat16()
    up = torch.full_like(gate, -2.0)
    found, grad_gate, grad_up = with_gradients(swiglu, gate, up, torch.ones_like(up))
    expected = with_gradients(plain, gate, up, torch.ones_like(up))
    for a, b in zip((found, grad_gate, grad_up), expected, strict=True):
        assert a.isfinite().all() and b.isfinite().all()
        torch.testing.assert_close(a, b, rtol=8e-3, atol=1e-6)


@both
def test_in_float32_it_is_that_of_float64(run, plain):
    gate, up, grad = (3 * random(5, 70, seed=seed) for seed in range(3))
    expected = with_gradients(plain, gate.double(), up.double(), grad.double())
    for a, b in zip(with_gradients(run, gate, up, grad), expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@both
def test_strides_do_not_matter(run, plain):
    both = random(4, 3, 64, seed=1).bfloat16()
    gate, up = both[..., :32], both[..., 32:]
    one = random(1, 1, 32, seed=2).bfloat16().expand(4, 3, 32)
    other = random(3, 4, 32, seed=3).bfloat16().transpose(0, 1)
    for of in ((gate, up, one), (other, up, other), (both[..., ::2], other, gate)):
        assert not any(x.is_contiguous() for x in of)
        for a, b in zip(with_gradients(run, *of), with_gradients(plain, *of), strict=True):
            torch.testing.assert_close(a, b, rtol=8e-3, atol=1e-6)


def test_gate_and_up_alone_are_kept():
    gate, up = (random(2, 8, seed=seed).bfloat16().requires_grad_() for seed in (0, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        swiglu(gate, up)
    assert kept == [gate.data_ptr(), up.data_ptr()]
