"""What is checked of the kernels for norms, gates and rotations, as functions of the device. See gpu_cases.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import make
import torch
from gpu_cases import ROUNDING
from torch import Tensor
from torch.nn.functional import silu
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.policy.forward import hidden_states
from dppo_cli.policy.loading import load_policy

MORE_THAN_PLAIN = 1.1
"""The error that a kernel may have, as a multiple of that of plain operations, both against float64."""
OTHERWISE_ROUNDED = 0.01
"""The share of numbers that may have other bits: those whose sums are added up in another order."""


def kernels_are_as_exact_as_plain_operations(device: str, dtype: torch.dtype, tokens: int) -> dict[str, float]:
    """By operation the share of outputs and gradients with other bits; in the shapes of Llama 3.1 8B and others."""
    from dppo_cli.kernels.fused.gated import swiglu
    from dppo_cli.kernels.fused.norm import add_and_norm, rms_norm
    from dppo_cli.kernels.fused.rotary import norm_and_rotate, rotate

    generator = torch.Generator().manual_seed(0)
    found: dict[str, float] = {}

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def heads(count: int, positions: int = tokens) -> Tensor:
        return random(2, positions, count, 128).transpose(1, 2)

    def norm_of(size: int) -> Qwen3RMSNorm:
        made = Qwen3RMSNorm(size).to(device, dtype).requires_grad_(False)
        made.weight.copy_(random(size))
        return made

    def compare(
        name: str, kernel: Callable[..., Any], plain: Callable[..., Any], *given: Tensor, gradient: bool = True
    ) -> None:
        first, second, right = (_results(run, given, gradient) for run in (kernel, kernel, plain))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), f"{name}: equal calls differ"
        exact = _results(plain, [x.double() for x in given], gradient)
        pairs = zip(first, right, exact, strict=True)
        errors = [(float((a - c).norm() / c.norm()), float((b - c).norm() / c.norm())) for a, b, c in pairs]
        for ours, plain_error in errors:
            assert ours <= MORE_THAN_PLAIN * plain_error, f"{name}: error {ours:.2g}, plain {plain_error:.2g}"
        other = sum(int((a != b).sum()) for a, b in zip(first, right, strict=True))
        found[name] = other / sum(a.numel() for a in first)
        assert found[name] <= OTHERWISE_ROUNDED, f"{name}: {found[name]:.2g} have other bits"

    for size in (4096, 3584, 896, 128, 64):
        of = norm_of(size)
        few = max(1, tokens * 896 // size)
        compare(f"norm of {size}", lambda x, of=of: rms_norm(x, of.weight, of.variance_epsilon), of, random(few, size))
        compare(
            f"sum and norm of {size}",
            lambda x, delta, of=of: add_and_norm(x, delta, of.weight, of.variance_epsilon),
            lambda x, delta, of=of: (x + delta, of(x + delta)),
            *(random(few, size), random(few, size)),
            gradient=False,
        )
    angle = torch.rand(2, tokens, 64, generator=generator).mul(10).repeat(1, 1, 2).to(device)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    compare(
        "rotation",
        lambda q, k: rotate(q, k, cos, sin),
        lambda q, k: apply_rotary_pos_emb(q, k, cos.to(q.dtype), sin.to(q.dtype)),
        *(heads(6), heads(2)),
    )
    q_norm, k_norm = norm_of(128), norm_of(128)
    compare(
        "rotation of norms",
        lambda q, k: norm_and_rotate(q, k, cos[:, :1], sin[:, :1], q_norm.weight, k_norm.weight, 1e-6),
        lambda q, k: apply_rotary_pos_emb(q_norm(q), k_norm(k), cos[:, :1].to(q.dtype), sin[:, :1].to(q.dtype)),
        *(heads(32, 1), heads(8, 1)),
        gradient=False,
    )
    for inner in (4864, 1000):
        compare(f"gate of {inner}", swiglu, lambda g, u: silu(g) * u, random(tokens, inner), random(tokens, inner))
    return found


def modules_agree_with_plain_ones(
    config: TrainConfig, device: str, dtype: str, shape: tuple[int, int] = (4, 33)
) -> float:
    """|g - g'| / |g| of the adapter's gradients with the kernels and with transformers' modules; compared."""
    policy = load_policy(
        config.model, replace(config.hardware, device=device, dtype=dtype), warn=make.fail, adapter=config.adapter
    )
    make.move_adapter(policy, 0.05)
    from dppo_cli.kernels.fused.layers import KINDS

    plain_of = {fused: plain for plain, fused in KINDS.items()}
    changed = [module for module in policy.model.modules() if type(module) in plain_of]
    assert changed, "the model has the kernels"
    ids = torch.randint(3, 70, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def gradient() -> tuple[Tensor, Tensor]:
        hidden = hidden_states(policy, ids)
        grads = torch.autograd.grad((hidden.float() * hidden.detach().float().cos()).sum(), policy.parameters)
        return hidden.detach().float(), torch.cat([g.flatten() for g in grads])

    (hidden, grad), again = gradient(), gradient()[1]
    assert torch.equal(grad, again)
    for module in changed:
        module.__class__ = plain_of[type(module)]
    plain_hidden, plain_grad = gradient()
    for ours, plain in ((hidden, plain_hidden), (grad, plain_grad)):
        apart = float((ours - plain).norm() / plain.norm())
        assert apart <= ROUNDING[policy.dtype], f"{apart:.2g} from plain modules"
    return apart


def _results(run: Callable[..., Any], given: Any, gradient: bool) -> list[Tensor]:
    inputs = [x.detach().requires_grad_(gradient) for x in given]
    out = run(*inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    if not gradient:
        return outs
    grads = [torch.linspace(-1, 1, x.numel(), device=x.device).view(x.shape).to(x.dtype) for x in outs]
    return [*(x.detach() for x in outs), *torch.autograd.grad(outs, inputs, grads)]
