"""The rotation's kernel against transformers' function, and its gradients against float64."""

import interpreted
import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.olmo2.modeling_olmo2 import apply_rotary_pos_emb as olmo_rotary
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi_rotary
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

fused = interpreted.kernels("rotary")
norm_and_rotate, rotate = fused.norm_and_rotate, fused.rotate
LLAMA, GEMMA = interpreted.kernels("norm").LLAMA, interpreted.kernels("norm").GEMMA
HALVES = (torch.bfloat16, torch.float16)
SHAPES = ((2, 5, 6, 2, 64), (1, 37, 4, 4, 16), (3, 1, 7, 1, 24), (5, 1, 3, 3, 8), (0, 4, 2, 1, 8), (2, 0, 2, 1, 8))
"""Sequences, positions, query and key heads, size of a head: several tiles, half a tile, one position, nothing."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles(sequences: int, positions: int, size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [B, T, D] of positions that differ between sequences."""
    position_BT1 = (torch.arange(positions) + 10 * torch.arange(max(sequences, 1))[:, None])[..., None]
    angle = (position_BT1 / 3.0 ** torch.arange(size // 2)).repeat(1, 1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def heads(sequences: int, positions: int, count: int, size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """As transformers makes them: a view of products."""
    return random(sequences, positions, count, size, seed=seed).to(dtype).transpose(1, 2)


def with_gradients(run, q, k, grads):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    out = run(q, k)
    return [*(x.detach() for x in out), *torch.autograd.grad(out, (q, k), grads)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_are_those_of_transformers(shape, dtype):
    sequences, positions, queries, keys, size = shape
    cos, sin = angles(sequences, positions, size, dtype)
    q, k, grad_q, grad_k = (
        heads(sequences, positions, count, size, dtype, seed) for seed, count in enumerate((queries, keys) * 2)
    )
    if not sequences:
        cos, sin = cos[:1], sin[:1]
    expected = with_gradients(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), q, k, (grad_q, grad_k))
    found = with_gradients(lambda q, k: rotate(q, k, cos, sin), q, k, (grad_q, grad_k))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for a, b in zip(rotate(q, k, cos, sin), expected, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("size", "turned"), [(64, 48), (24, 8), (16, 16)])
def test_a_part_of_a_head_is_rotated_as_in_phi(size, turned, dtype):
    cos, sin = angles(2, 5, turned, dtype)
    q, k, grad_q, grad_k = (heads(2, 5, count, size, dtype, seed) for seed, count in enumerate((6, 2, 6, 2)))
    expected = with_gradients(lambda q, k: phi_rotary(q, k, cos, sin), q, k, (grad_q, grad_k))
    for a, b in zip(with_gradients(lambda q, k: rotate(q, k, cos, sin), q, k, (grad_q, grad_k)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_angles_may_be_in_float32_as_in_olmo(dtype):
    cos, sin = angles(2, 5, 16, torch.float32)
    q, k, grad_q, grad_k = (heads(2, 5, count, 16, dtype, seed) for seed, count in enumerate((6, 2, 6, 2)))
    expected = with_gradients(lambda q, k: olmo_rotary(q, k, cos, sin), q, k, (grad_q, grad_k))
    found = with_gradients(lambda q, k: rotate(q, k, cos, sin), q, k, (grad_q, grad_k))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    rounded, _ = rotate(q, k, cos.to(dtype), sin.to(dtype))
    assert not torch.equal(rounded, found[0])


def test_strides_and_shared_angles_do_not_matter():
    cos, sin = (x[:1] for x in angles(2, 9, 16, torch.bfloat16))
    of_one = cos.expand(2, 9, 16), sin.repeat(2, 1, 1)
    whole = random(2, 9, 5, 48, seed=1).bfloat16()
    q, k = whole[:, :, :3, :16].transpose(1, 2), whole[:, :, 3:, 16:32].transpose(1, 2)
    every_second = random(2, 3, 9, 32, seed=2).bfloat16()[..., ::2]
    grads = (every_second, random(1, 1, 9, 16, seed=3).bfloat16().expand(2, 2, 9, 16))
    for q_one, k_one in ((q, k), (q.contiguous(), k.contiguous()), (every_second, k)):
        expected = with_gradients(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), q_one, k_one, grads)
        for given in ((cos, sin), of_one):
            found = with_gradients(lambda q, k, given=given: rotate(q, k, *given), q_one, k_one, grads)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_in_float32_it_is_that_of_float64():
    cos, sin = angles(2, 7, 32, torch.float64)
    q, k, grad_q, grad_k = (heads(2, 7, count, 32, torch.float64, seed) for seed, count in enumerate((4, 2, 4, 2)))
    expected = with_gradients(lambda q, k: apply_rotary_pos_emb(q, k, cos, sin), q, k, (grad_q, grad_k))
    cos, sin = cos.float(), sin.float()
    found = with_gradients(lambda q, k: rotate(q, k, cos, sin), q.float(), k.float(), (grad_q.float(), grad_k.float()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_one_alone():
    """Keys before the first adapter need none."""
    cos, sin = angles(1, 4, 8, torch.bfloat16)
    q, k = (heads(1, 4, 2, 8, torch.bfloat16, seed) for seed in (0, 1))
    q.requires_grad_()
    turned, _ = rotate(q, k, cos, sin)
    expected, _ = apply_rotary_pos_emb(q, k, cos, sin)
    found, right = (torch.autograd.grad(x.float().square().sum(), q)[0] for x in (turned, expected))
    torch.testing.assert_close(found, right, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(3, 1, 6, 2, 24), (2, 5, 4, 4, 16), (0, 1, 2, 1, 8)], ids=str)
@pytest.mark.parametrize(("kind", "form"), [(Qwen3RMSNorm, LLAMA), (Gemma3RMSNorm, GEMMA)])
def test_heads_are_normed_before(kind, form, shape, dtype):
    sequences, positions, queries, keys, size = shape
    cos, sin = (x[:sequences] for x in angles(sequences, positions, size, dtype))
    norms = [kind(size, eps=1e-3).requires_grad_(False).to(dtype) for _ in range(2)]
    for seed, of in enumerate(norms):
        of.weight.copy_(1 + random(size, seed=seed) / 3)
    q, k = (heads(sequences, positions, count, size, dtype, seed) for seed, count in ((4, queries), (5, keys)))
    found = norm_and_rotate(q, k, cos, sin, *(of.weight for of in norms), 1e-3, form)
    expected = apply_rotary_pos_emb(norms[0](q), norms[1](k), cos, sin)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)
        assert int((a != b).sum()) <= a.numel() // 100


def test_angles_alone_are_kept():
    cos, sin = angles(1, 4, 8, torch.bfloat16)
    q, k = (heads(1, 4, 2, 8, torch.bfloat16, seed).requires_grad_() for seed in (0, 1))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        rotate(q, k, cos, sin)
    assert kept == [cos.data_ptr(), sin.data_ptr()]
