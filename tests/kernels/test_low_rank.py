"""LoRA's sum as one operation, against PEFT's own layer."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import four_bit_layers
import make
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from transformers import AutoModelForCausalLM

from dppo_cli.kernels.four_bits import dequantizer
from dppo_cli.kernels.low_rank import LeanLoraLinear, adapted_linear, lean_4_bit, make_lean
from dppo_cli.policy.forward import hidden_states
from dppo_cli.policy.policy import Policy

IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22], [9, 9, 3, 30, 31, 7, 60, 61, 3, 4, 4]])


@contextmanager
def peft_layers(policy: Policy) -> Iterator[int]:
    """The policy with PEFT's layers; how many there are."""
    lean = [m for m in policy.model.modules() if isinstance(m, LeanLoraLinear)]
    for module in lean:
        module.__class__ = LoraLinear
    yield len(lean)
    for module in lean:
        module.__class__ = LeanLoraLinear


def states_and_gradient(policy: Policy) -> tuple[torch.Tensor, list[torch.Tensor]]:
    torch.manual_seed(3)  # for the adapter's dropout
    states = hidden_states(policy, IDS)
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    return states.detach(), list(torch.autograd.grad((states * direction).sum(), policy.parameters))


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_model_is_the_one_that_peft_makes(train_config, architecture, dropout):
    policy = make.policy(train_config(f"adapter.dropout={dropout}", model=architecture), adapter_scale=0.1)
    found, gradient = states_and_gradient(policy)
    with peft_layers(policy) as layers:
        assert layers >= 8
        expected, expected_gradient = states_and_gradient(policy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    for a, b in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert b.abs().max() > 1e-3
    with policy.without_adapter(), torch.no_grad():
        assert (hidden_states(policy, IDS) - expected).abs().max() > 0.05, "the adapter made no difference"


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize(("architecture", "dropout"), [("llama3", 0.0), ("qwen3", 0.3)])
def test_a_4_bit_base_is_dequantised(train_config, architecture, dropout, checkpointing):
    """As on a GPU, against PEFT's layers, which stay on a CPU."""
    words = ("adapter=qlora", f"adapter.dropout={dropout}", f"hardware.gradient_checkpointing={checkpointing}")
    policy = make.policy(train_config(*words, model=architecture), adapter_scale=0.1)
    plain, lean = lean_4_bit()
    expected, expected_gradient = states_and_gradient(policy)
    make_lean(policy.model, torch.device("cuda"))
    layers = [m for m in policy.model.modules() if isinstance(m, plain)]
    assert len(layers) >= 8 and {type(m) for m in layers} == {lean}
    found, gradient = states_and_gradient(policy)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    for a, b in zip(gradient, expected_gradient, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert b.abs().max() > 1e-3


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16], ids=str)
def test_a_4_bit_base_that_cannot_be_dequantised_stays_pefts(storage):
    """Codes that are stored as bfloat16 are not taken for weights."""
    base = four_bit_layers.layer(8, 64, bias=True, quant_storage=storage)
    base.compute_dtype = torch.float32
    assert dequantizer(base) is None and base.weight.dtype == storage
    plain, lean = lean_4_bit()
    layer = plain(base, "default", LoraConfig(init_lora_weights=False), r=4, lora_alpha=8)
    x = four_bit_layers.random(3, 64)
    expected = layer(x)
    make_lean(layer, torch.device("cuda"))
    assert type(layer) is lean
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    assert (expected - base(x)).abs().max() > 0.1, "the adapter made no difference"


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_sum_and_its_gradient(shape, bias):
    torch.manual_seed(0)
    x, other = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2))
    a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 5), (4, 2)))
    w, c = torch.randn(4, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64) if bias else None
    expected = torch.nn.functional.linear(x, w, c) + 0.7 * (other @ a.t()) @ b.t()
    torch.testing.assert_close(adapted_linear(x, other, w, c, a, b, 0.7), expected)
    assert torch.autograd.gradcheck(lambda x, d, a, b: adapted_linear(x, d, w, c, a, b, 0.7), (x, other, a, b))
    assert torch.autograd.gradcheck(lambda x, a, b: adapted_linear(x, x, w, c, a, b, 0.7), (x, a, b))


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_float32_by_other_means_is_the_same_product(same, transposed):
    """Against float64 by torch's own product; a weight may be kept the other way round, as GPT-2's are."""
    torch.manual_seed(0)
    x, other, w = torch.randn(3, 70, 48), torch.randn(3, 70, 48), torch.randn(40, 48)
    a, b, direction = torch.randn(4, 48), torch.randn(40, 4), torch.randn(3, 70, 40)
    found, exact = [], []
    for dtype, results in ((torch.float32, found), (torch.float64, exact)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, other, a, b)]
        weight = w.to(dtype).t().contiguous().t() if transposed else w.to(dtype)
        out = adapted_linear(leaves[0], leaves[0 if same else 1], weight, None, *leaves[2:], 0.5)
        results += [out, *torch.autograd.grad((out * direction.to(dtype)).sum(), leaves, materialize_grads=True)]
    for f, e in zip(found, exact, strict=True):
        # Sums of up to 210 products, of size 10 at most, in float32.
        torch.testing.assert_close(f, e.float(), rtol=1e-5, atol=2e-4)


def test_a_bfloat16_base_keeps_its_precision():
    """As under autocast: the float32 adapter is rounded for the product, its gradient is float32."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, dtype=torch.bfloat16, requires_grad=True)
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    ones = torch.ones(4, dtype=torch.bfloat16)
    out = adapted_linear(x, x, torch.zeros(4, 5, dtype=torch.bfloat16), ones, a, b, 0.5)
    out.float().sum().backward()
    assert (out.dtype, x.grad.dtype, a.grad.dtype, b.grad.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    exact = 1 + 0.5 * (x.float() @ a.t()) @ b.t()
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.03)
    torch.testing.assert_close(b.grad, 0.5 * (x.float() @ a.t()).sum(0).expand(4, 2), rtol=0.03, atol=0.03)


def test_a_frozen_input_gets_no_gradient():
    a, b = torch.randn(2, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)
    x = torch.randn(6, 5)
    adapted_linear(x, x, torch.zeros(4, 5), None, a, b, 1.0).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(b.grad, (x @ a.t()).sum(0).expand(4, 2))


def test_an_adapter_with_biases_stays_pefts(tiny_models):
    """The lean sum has none, so it would leave them out."""
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama3"])
    with warnings.catch_warnings():
        # Of layers without a bias of their own, which concerns merging, and of names that transformers will drop.
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_bias=True))
    torch.manual_seed(0)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = model(input_ids=IDS).logits
    make_lean(model, torch.device("cpu"))
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=0)
    assert sum(isinstance(m, LeanLoraLinear) for m in model.modules()) == 4
