"""The norm's kernels against transformers' modules, and their gradients against float64."""

import copy

import interpreted
import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

fused = interpreted.kernels("norm")
add_and_norm, norm = fused.add_and_norm, fused.rms_norm
FORMS = {Qwen3RMSNorm: fused.LLAMA, Olmo2RMSNorm: fused.OLMO, Gemma3RMSNorm: fused.GEMMA}
EPS = 1e-5
HALVES = (torch.bfloat16, torch.float16)
SHAPES = ((3, 2, 896), (2, 3584), (70, 128), (1, 1, 16), (5, 5000), (0, 64), (2, 0, 32))
"""Hidden sizes that fill no tile, heads of which 32 share one, more than a tile, nothing."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(size: int, dtype: torch.dtype, eps: float = EPS, kind: type = Qwen3RMSNorm) -> torch.nn.Module:
    made = kind(size, eps=eps).requires_grad_(False)
    made.weight.copy_(1 + random(size, seed=1) / 3)
    return made.to(dtype)


def with_gradient(run, x: torch.Tensor, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.detach().requires_grad_()
    out = run(x)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def views(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers [4, 6, 64] with other strides."""
    return {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "part of longer rows": torch.cat([x, x], -1)[..., :64],
        "every second number": x.repeat_interleave(2, -1)[..., ::2],
        "one row for all": x[:1, :1].expand(4, 6, 64),
    }


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", list(FORMS))
def test_bits_are_those_of_transformers(kind, shape, dtype):
    of, form = module(shape[-1], dtype, kind=kind), FORMS[kind]
    x, grad = (random(*shape, seed=seed).to(dtype) for seed in (2, 3))
    expected, expected_grad = with_gradient(of, x, grad)
    found, found_grad = with_gradient(lambda x: norm(x, of.weight, EPS, form), x, grad)
    assert found.dtype == found_grad.dtype == dtype
    assert found.is_contiguous() and found.shape == x.shape
    # Sums in another order may round to the neighbour, of one number in thousands.
    for a, b in ((found, expected), (found_grad, expected_grad)):
        assert int((a != b).sum()) <= a.numel() // 1000
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(norm(x, of.weight, EPS, form), found, rtol=0, atol=0)


@pytest.mark.parametrize("kind", list(views(torch.zeros(4, 6, 64))))
def test_strides_do_not_matter(kind):
    of = module(64, torch.bfloat16)
    x, grad = (views(random(4, 6, 64, seed=seed).bfloat16())[kind] for seed in (2, 3))
    assert not x.is_contiguous()
    expected = with_gradient(of, x, grad)
    found = with_gradient(lambda x: norm(x, of.weight, of.variance_epsilon), x, grad)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 1e4])
def test_in_float32_it_is_that_of_float64(scale):
    """At a scale of 1e-3 eps has as much to say as x."""
    of = module(96, torch.float32, eps=1e-6)
    x, grad = scale * random(7, 96, seed=2), random(7, 96, seed=3)
    found = with_gradient(lambda x: norm(x, of.weight, of.variance_epsilon), x, grad)

    def exact(x: torch.Tensor) -> torch.Tensor:
        return of.weight.double() * x / (x.square().mean(-1, keepdim=True) + of.variance_epsilon).sqrt()

    expected = with_gradient(exact, x.double(), grad.double())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def test_gradients_in_bfloat16_are_those_of_float64_but_for_rounding():
    of = module(896, torch.bfloat16)
    x, grad = (random(5, 896, seed=seed).bfloat16() for seed in (2, 3))
    exact = copy.deepcopy(of).double()
    _, found = with_gradient(lambda x: norm(x, of.weight, of.variance_epsilon), x, grad)

    def run(x: torch.Tensor) -> torch.Tensor:
        return exact.weight * x / (x.square().mean(-1, keepdim=True) + of.variance_epsilon).sqrt()

    _, expected = with_gradient(run, x.double(), grad.double())
    assert float((found - expected).norm() / expected.norm()) < 3e-3


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(5, 1, 896), (33, 128), (0, 64)], ids=str)
def test_the_sum_is_rounded_before_its_norm(shape, dtype):
    of = module(shape[-1], dtype)
    x, delta = (random(*shape, seed=seed).to(dtype) for seed in (2, 3))
    total, out = add_and_norm(x, delta, of.weight, of.variance_epsilon)
    torch.testing.assert_close(total, x + delta, rtol=0, atol=0)
    torch.testing.assert_close(out, norm(x + delta, of.weight, of.variance_epsilon), rtol=0, atol=0)


def test_what_is_added_may_be_part_of_longer_rows():
    """As a product gives it that leaves something behind its outputs; it is not copied."""
    of = module(64, torch.bfloat16)
    x, longer = random(5, 1, 64, seed=2).bfloat16(), random(5, 1, 192, seed=3).bfloat16()
    delta = longer[..., :64]
    assert fused.in_rows(delta).data_ptr() == longer.data_ptr()
    expected = add_and_norm(x, delta.contiguous(), of.weight, of.variance_epsilon)
    for a, b in zip(add_and_norm(x, delta, of.weight, of.variance_epsilon), expected, strict=True):
        assert torch.equal(a, b) and a.is_contiguous()


def test_x_and_a_number_for_each_row_are_kept():
    of = module(512, torch.bfloat16)
    x, kept = random(3, 4, 512).bfloat16().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm(x, of.weight, of.variance_epsilon)
    assert {(tuple(t.shape), t.dtype) for t in kept} == {
        ((3, 4, 512), torch.bfloat16),
        ((12,), torch.float32),
        ((512,), torch.bfloat16),
    }
    assert of.weight.data_ptr() in {t.data_ptr() for t in kept} and x.data_ptr() in {t.data_ptr() for t in kept}
