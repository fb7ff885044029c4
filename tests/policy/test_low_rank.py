"""LoRA's sum in place, against PEFT's own layer."""

from collections.abc import Iterator
from contextlib import contextmanager

import make
import pytest
import tiny
import torch
from peft.tuners.lora.layer import Linear as LoraLinear

from dppo_cli.policy.low_rank import LeanLoraLinear, add_low_rank
from dppo_cli.policy.policy import Policy

IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22], [9, 9, 3, 30, 31, 7, 60, 61, 3, 4, 4]])


@contextmanager
def pefts_own(policy: Policy) -> Iterator[int]:
    """The policy with PEFT's layers; how many there are."""
    lean = [m for m in policy.model.modules() if isinstance(m, LeanLoraLinear)]
    for module in lean:
        module.__class__ = LoraLinear
    yield len(lean)
    for module in lean:
        module.__class__ = LeanLoraLinear


def states_and_gradient(policy: Policy) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(3)  # for the adapter's dropout
    states = policy.hidden_states(IDS)
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    return states.detach(), list(torch.autograd.grad((states * direction).sum(), policy.parameters))


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_is_the_one_that_peft_makes(train_config, architecture, dropout):
    policy = make.policy(train_config(f"adapter.dropout={dropout}", model=architecture), adapter_scale=0.1)
    found, gradient = states_and_gradient(policy)
    with pefts_own(policy) as layers:
        assert layers >= 8
        expected, expected_gradient = states_and_gradient(policy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    for a, b in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert b.abs().max() > 1e-3
    with policy.without_adapter(), torch.no_grad():
        assert (policy.hidden_states(IDS) - expected).abs().max() > 0.05, "the adapter made no difference"


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
def test_the_sum_and_its_gradient(shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    w, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((4, 5), (2, 5), (4, 2)))
    expected = x @ w.t() + 0.7 * (x @ a.t()) @ b.t()
    torch.testing.assert_close(add_low_rank(x @ w.t(), x, a, b, 0.7), expected)
    assert torch.autograd.gradcheck(lambda x, w, a, b: add_low_rank(x @ w.t(), x, a, b, 0.7), (x, w, a, b))


def test_a_bfloat16_base_keeps_its_precision():
    """As under autocast: the float32 adapter is rounded for the product, its gradient is float32."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.bfloat16, requires_grad=True)
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    out = add_low_rank(torch.ones(6, 4, dtype=torch.bfloat16), x, a, b, 0.5)
    out.float().sum().backward()
    assert (out.dtype, x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    exact = 1 + 0.5 * (x.float() @ a.t()) @ b.t()
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)
    torch.testing.assert_close(b.grad, 0.5 * (x.float() @ a.t()).sum(0).expand(4, 2), rtol=0.03, atol=0.03)


def test_a_frozen_input_gets_no_gradient():
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    x = torch.randn(6, 5)
    add_low_rank(torch.zeros(6, 4), x, a, b, 1.0).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(b.grad, (x @ a.t()).sum(0).expand(4, 2))
