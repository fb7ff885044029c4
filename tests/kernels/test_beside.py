"""LoRA beside the weights for sampling, against PEFT's own layers."""

from dataclasses import replace

import make
import pytest
import torch
from peft.tuners.lora import LoraLayer
from recording import addresses
from torch import nn

from dppo_cli.kernels.beside import Beside

SIBLINGS = ("q_proj", "k_proj", "v_proj")


def layers(policy, names=SIBLINGS) -> list[nn.Module]:
    attention = policy.model.model.layers[0].self_attn
    return [getattr(attention, name) for name in names]


def inputs(policy, rows: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, policy.model.config.hidden_size, generator=generator).to(dtype)


@pytest.mark.parametrize("names", [SIBLINGS, ("o_proj",)], ids=["siblings", "one"])
@pytest.mark.parametrize("words", [(), ("adapter.r=2", "adapter.alpha=7"), ("adapter.use_rslora=true",)])
@torch.inference_mode()
def test_the_products_are_those_of_the_layers(train_config, words, names):
    policy = make.policy(train_config(*words), adapter_scale=0.3)
    of, x = layers(policy, names), inputs(policy)
    found = Beside(torch.float32)(*of)(x)
    assert len(found) == len(of)
    for out, layer in zip(found, of, strict=True):
        torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)
        assert (out - layer.get_base_layer()(x)).abs().max() > 0.1, "the adapter has an effect here"


@torch.inference_mode()
def test_a_4_bit_base(train_config):
    policy = make.policy(train_config("adapter=qlora", "hardware.dtype=float32"), adapter_scale=0.3)
    of, x = layers(policy), inputs(policy)
    for out, layer in zip(Beside(torch.float32)(*of)(x), of, strict=True):
        torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_in_bfloat16_it_rounds_as_the_layers_do_under_autocast(train_config):
    """But for the sum, which is rounded once and not three times."""
    policy = make.policy(train_config(), adapter_scale=0.3)
    policy = replace(policy, model=policy.model.to(torch.bfloat16), dtype=torch.bfloat16)
    of, x = layers(policy), inputs(policy, dtype=torch.bfloat16)
    with policy.autocast():
        expected = [layer(x) for layer in of]
    for out, layer in zip(Beside(torch.bfloat16)(*of)(x), expected, strict=True):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out, layer, rtol=2**-7, atol=2**-7)


@torch.inference_mode()
def test_refreshing_takes_over_the_adapter_in_place(train_config):
    policy = make.policy(train_config(), adapter_scale=0.3)
    of, x = layers(policy), inputs(policy)
    beside = Beside(torch.float32)
    products = beside(*of)
    before = addresses(*beside.copies)
    make.move_adapter(policy, 0.5, seed=1)
    stale = products(x)
    beside.refresh()
    assert addresses(*beside.copies) == before
    for out, old, layer in zip(products(x), stale, of, strict=True):
        torch.testing.assert_close(out, layer(x), rtol=1e-5, atol=1e-5)
        assert (out - old).abs().max() > 0.1


@pytest.mark.parametrize(
    "words",
    [("adapter.use_dora=true",), ("adapter.target_modules=[q_proj]",)],
    ids=["DoRA", "a sibling without an adapter"],
)
@torch.inference_mode()
def test_other_layers_run_as_they_are(train_config, words):
    policy = make.policy(train_config(*words), adapter_scale=0.3)
    of, x = layers(policy), inputs(policy)
    beside = Beside(torch.float32)
    found = beside(*of)(x)
    assert not beside.copies
    beside.refresh()
    for out, layer in zip(found, of, strict=True):
        assert torch.equal(out, layer(x))


@torch.inference_mode()
def test_so_do_switched_off_merged_and_several_adapters(train_config):
    policy = make.policy(train_config(), adapter_scale=0.3)
    of, x = layers(policy), inputs(policy)
    with policy.without_adapter():
        beside = Beside(torch.float32)
        for out, layer in zip(beside(*of)(x), of, strict=True):
            assert torch.equal(out, layer(x)) and torch.equal(out, layer.get_base_layer()(x))
        assert not beside.copies
    policy.peft.add_adapter("second", policy.peft.peft_config["default"])
    for layer in of:
        assert isinstance(layer, LoraLayer)
        layer.set_adapter(["default", "second"])
    beside = Beside(torch.float32)
    beside(*of)
    assert not beside.copies
