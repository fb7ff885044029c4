"""LoRA beside the weights for sampling, against PEFT's own layers."""

from dataclasses import replace

import four_bit_layers
import interpreted
import make
import pytest
import torch
from beside_cases import SIBLINGS, inputs, layers
from peft.tuners.lora import LoraLayer
from recording import addresses
from torch import nn

from dppo_cli.kernels import beside as beside_module
from dppo_cli.kernels.beside import Beside


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


class TestFused:
    """4-bit bases by the kernel, in the interpreter, as on a GPU."""

    @pytest.fixture
    def four_bits(self, monkeypatch):
        interpreted.kernels("nf4")
        monkeypatch.setattr(beside_module, "without_triton", lambda *_: None)
        beside_module._refused.cache_clear()
        yield
        beside_module._refused.cache_clear()

    @staticmethod
    def policy(train_config, *words: str, dtype: torch.dtype = torch.bfloat16, inputs: int = 64):
        policy = make.policy(train_config("adapter=qlora", *words), adapter_scale=0.3)
        for layer in layers(policy):
            base = layer.get_base_layer()
            layer.base_layer = four_bit_layers.layer(
                base.out_features, inputs, dtype, bias=True, seed=base.out_features
            )
            for part in (*layer.lora_A.values(), *layer.lora_B.values()):
                if part.in_features == base.in_features:
                    part.weight = nn.Parameter(four_bit_layers.random(part.out_features, inputs) / 4)
        return policy

    @torch.inference_mode()
    def test_as_near_to_the_trainer_as_plain_operations(self, train_config, four_bits, monkeypatch):
        policy = self.policy(train_config)
        of = layers(policy)
        x = four_bit_layers.random(40, 1, 64).bfloat16()
        with policy.autocast(), torch.autocast("cpu", torch.bfloat16):
            expected = [layer(x) for layer in of]
        fused = Beside(torch.bfloat16, make.fail)
        found = fused(*of)(x)
        assert [type(parameters[0]).__name__ for parameters, _ in fused.wholes] == ["Params4bit"]
        monkeypatch.setattr(beside_module, "without_triton", lambda *_: "")
        plain = Beside(torch.bfloat16, make.fail)
        today = plain(*of)(x)
        assert not plain.wholes

        def apart(a: list[torch.Tensor]) -> float:
            pairs = zip(a, expected, strict=True)
            return float(torch.cat([(one.double() - right.double()).abs().flatten() for one, right in pairs]).mean())

        assert 0 < apart(found) <= 1.05 * apart(today)

    @torch.inference_mode()
    def test_the_adapter_is_taken_over_in_place(self, train_config, four_bits):
        policy = self.policy(train_config)
        of, x = layers(policy), four_bit_layers.random(3, 1, 64).bfloat16()
        beside = Beside(torch.bfloat16, make.fail)
        products = beside(*of)
        before, stale = addresses(*beside.copies), products(x)
        for layer in of:
            for part in layer.lora_B.values():
                part.weight.mul_(3)
        beside.refresh()
        assert addresses(*beside.copies) == before
        for out, old, new in zip(products(x), stale, Beside(torch.bfloat16, make.fail)(*of)(x), strict=True):
            assert torch.equal(out, new) and (out - old).abs().max() > 0.1

    @torch.inference_mode()
    def test_siblings_of_different_ranks_are_products_of_their_own(self, train_config, four_bits):
        policy = self.policy(train_config, "adapter.r=4")
        of, x = layers(policy), four_bit_layers.random(3, 1, 64).bfloat16()
        for layer in of[1:]:
            for parts in (layer.lora_A, layer.lora_B):
                for part in parts.values():
                    part.weight = nn.Parameter(part.weight[:3] if parts is layer.lora_A else part.weight[:, :3])
        beside = Beside(torch.bfloat16, make.fail)
        found = beside(*of)(x)
        assert len(beside.wholes) == 3
        with torch.autocast("cpu", torch.bfloat16):
            for out, layer in zip(found, of, strict=True):
                torch.testing.assert_close(out, layer(x), rtol=2**-6, atol=2**-5)

    @torch.inference_mode()
    def test_more_rows_than_the_kernel_is_good_for(self, train_config, four_bits):
        nf4_product = interpreted.kernels("nf4_product")
        policy = self.policy(train_config)
        of, x = layers(policy), four_bit_layers.random(nf4_product.MOST_ROWS + 1, 1, 64).bfloat16()
        calls = []
        for layer in of:
            layer.get_base_layer().register_forward_hook(lambda *_: calls.append(1))
        products = Beside(torch.bfloat16, make.fail)(*of)
        few, many = products(x[:2]), products(x)
        assert len(calls) == 3
        for a, b in zip(few, many, strict=True):
            torch.testing.assert_close(a, b[:2], rtol=2**-6, atol=2**-5)

    @pytest.mark.parametrize(
        ("spoil", "said"),
        [
            (lambda base: setattr(base.weight.quant_state, "blocksize", 128), "a scale belongs to 128 weights, not 64"),
            (lambda base: setattr(base, "compute_dtype", torch.float16), "it is made for bfloat16"),
        ],
    )
    @torch.inference_mode()
    def test_what_it_cannot_compute_is_said_once(self, train_config, four_bits, spoil, said):
        policy = self.policy(train_config)
        of, warned = layers(policy), []
        spoil(of[1].get_base_layer())
        beside = Beside(torch.bfloat16, warned.append)
        for _ in range(2):
            beside(*of)
        assert warned == [beside_module.NOT_FUSED.format(said)] and not beside.wholes

    @torch.inference_mode()
    def test_neither_is_a_kernel_used_that_computes_something_else(self, train_config, four_bits, monkeypatch):
        monkeypatch.setattr(interpreted.kernels("nf4_product"), "difference", lambda *_: 0.5)
        policy, warned = self.policy(train_config), []
        Beside(torch.bfloat16, warned.append)(*layers(policy))
        assert warned == [beside_module.NOT_FUSED.format("its results are 0.5 off")]


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
