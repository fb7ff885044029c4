"""The sampling copy: the policy's logits from plain weights, and the policy's weights left alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import pytest
import tiny
import torch
from engines import ROUNDING, generate, sampling, trained
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.errors import ModelError
from dppo_cli.kernels.low_rank import make_lean
from dppo_cli.kernels.packed import PackedLinear, Sibling
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout import copies
from dppo_cli.rollout.copies import SamplingCopy

architectures = pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22]])


def weights(of: Policy) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in of.model.named_parameters()}


def merged_weights(copy: SamplingCopy) -> dict[str, torch.Tensor]:
    """By the names that plain layers would have."""
    with copy.filled() as sampler:
        found = dict(sampler.model.named_parameters())
        for name, module in sampler.model.named_modules():
            if isinstance(module, Sibling):
                whole = module.siblings.linear.packed.to_dense()
                found[f"{name}.weight"] = whole.split(module.siblings.sizes)[module.member]
            elif isinstance(module, PackedLinear):
                found[f"{name}.weight"] = module.packed.to_dense()
        return {name: value.detach().clone() for name, value in found.items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


@architectures
@torch.no_grad()
def test_the_copy_computes_what_the_policy_computes(train_config, architecture):
    """Every linear kind, GPT-2's transposed Conv1D with biases among them."""
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    before = weights(policy)
    copy = SamplingCopy(policy.model, torch.float32, merge=True)
    assert not any(isinstance(module, LoraLayer) for module in copy.model.modules())
    assert not any(parameter.requires_grad for parameter in copy.model.parameters())
    with copy.filled() as sampler:
        head = sampler.head
        found, expected = sampler.model(IDS).logits, policy.model(IDS).logits
        hidden_LH = sampler.model.base_model(IDS).last_hidden_state[0]
        for product_LV in (head.product(hidden_LH), sampler.product(hidden_LH)):
            log_pi_LV = head.tempered(product_LV).log_softmax(-1)
            torch.testing.assert_close(log_pi_LV, expected[0].log_softmax(-1), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    with policy.without_adapter():
        assert (policy.model(IDS).logits - expected).abs().max() > 0.1, "the adapter made no difference"
    assert_same(weights(policy), before)
    assert len(policy.parameters) == len([name for name in before if "lora_" in name])


def test_merging_again_does_not_drift(train_config):
    policy = make.policy(train_config(model="gpt2"), adapter_scale=0.1, seed=1)
    copy = SamplingCopy(policy.model, torch.float32, merge=True)
    first = merged_weights(copy)
    assert_same(merged_weights(copy), first)
    for seed in (2, 3, 1):
        make.move_adapter(policy, 0.1, seed)
        last = merged_weights(copy)
    assert_same(last, first)


def test_a_fresh_adapter_leaves_the_base_bit_for_bit(train_config):
    policy = make.policy(train_config())
    copy = SamplingCopy(policy.model, torch.float32, merge=True)
    base = {name.replace(".base_layer", ""): value for name, value in weights(policy).items() if "lora_" not in name}
    assert_same(merged_weights(copy), base)


@architectures
def test_layers_without_adapter_share_memory(train_config, architecture):
    policy = make.policy(train_config(model=architecture))
    copy = SamplingCopy(policy.model, torch.float32, merge=True)
    original = dict(policy.model.named_parameters())
    shared = set()
    for name, parameter in copy.model.named_parameters():
        if name in original:
            shared.add(name)
            assert parameter.data_ptr() == original[name].data_ptr(), name
        else:  # "q_proj.weight" here, "q_proj.base_layer.weight" there
            layer, _, kind = name.rpartition(".")
            twin = original[f"{layer}.base_layer.{kind}"]
            assert (parameter.data_ptr() == twin.data_ptr()) is (kind == "bias"), name
    assert any("embed" in name or "wte" in name for name in shared)
    assert any("norm" in name or "ln_" in name for name in shared)


def test_layers_of_one_input_are_one_product(train_config):
    policy = make.policy(train_config("adapter.target_modules=[q_proj,v_proj,o_proj,up_proj]"))
    copy = SamplingCopy(policy.model, torch.float32, merge=True)
    names = {id(m): name for name, m in policy.model.named_modules()}
    groups = [[names[id(layer)].removeprefix("model.layers.") for layer in layers] for layers, _ in copy.fills]
    assert [group for group in groups if group[0].startswith("0.")] == [
        ["0.self_attn.q_proj", "0.self_attn.v_proj"],
        ["0.self_attn.o_proj"],
        ["0.mlp.up_proj"],
    ]


def test_only_the_chosen_layers_are_copied(train_config):
    policy = make.policy(train_config("adapter.target_modules=[q_proj,down_proj]"), adapter_scale=0.1)
    copy = SamplingCopy(policy.model, torch.float32, merge=True)
    addresses = {parameter.data_ptr() for parameter in policy.model.parameters()}
    assert all(parameter.data_ptr() in addresses for parameter in copy.model.parameters())
    own = {name.split(".")[-1] for name, m in copy.model.named_modules() if isinstance(m, PackedLinear)}
    assert own == {"q_proj", "down_proj"}
    with copy.filled() as sampler:
        torch.testing.assert_close(sampler.model(IDS).logits, policy.model(IDS).logits, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("architecture", ["llama3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_merged_outlives_the_sampling(train_config, architecture, dtype):
    """Not after an error either: training gets the memory back."""
    policy = make.policy(train_config(model=architecture))
    own = {id(p) for p in policy.model.parameters()}

    def held() -> int:
        found = [m.packed if isinstance(m, PackedLinear) else m.weight for _, m in copy.fills]
        return sum(w.numel() for w in found if w is not None and id(w) not in own)

    copy = SamplingCopy(policy.model, dtype, merge=True)
    adapted = sum(layer.get_base_layer().weight.numel() for layers, _ in copy.fills for layer in layers)
    assert held() == 0
    with copy.filled():
        assert held() == adapted > 0
    assert held() == 0
    with pytest.raises(KeyboardInterrupt), copy.filled():
        raise KeyboardInterrupt
    assert held() == 0


@architectures
def test_another_precision_is_a_copy_of_its_own(train_config, architecture):
    policy = make.policy(train_config(model=architecture), adapter_scale=0.1)
    before = weights(policy)
    logits = policy.model(IDS).logits
    copy = SamplingCopy(policy.model, torch.bfloat16, merge=True)
    assert {p.dtype for p in copy.model.parameters()} == {torch.bfloat16}
    assert_same(weights(policy), before)
    assert torch.equal(policy.model(IDS).logits, logits)
    assert copy.model.get_output_embeddings().weight.dtype == torch.bfloat16
    tied = policy.model.get_output_embeddings().weight is policy.model.get_input_embeddings().weight
    assert (copy.model.get_output_embeddings().weight is copy.model.get_input_embeddings().weight) is tied
    buffers = dict(policy.model.named_buffers())
    for name, buffer in copy.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype, f"{name}: rounded rotary frequencies lose distant positions"


def test_weights_are_rounded_once(train_config):
    """To bfloat16 after the sum, not W and delta W each by itself."""
    policy = make.policy(train_config(), adapter_scale=0.3)
    copy = SamplingCopy(policy.model, torch.bfloat16, merge=True)
    layer = policy.model.get_submodule("model.layers.0.self_attn.q_proj")
    sum_ = layer.get_base_layer().weight + layer.get_delta_weight("default")
    assert torch.equal(merged_weights(copy)["model.layers.0.self_attn.q_proj.weight"], sum_.bfloat16())


# Adapters that are more than W + s B A


def adapted(folder: Path, config: TrainConfig, **options: Any) -> Policy:
    """A policy whose adapter PEFT made from `options`, moved away from its start."""
    plain = make.plain_policy(folder, config)
    settings = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    torch.manual_seed(0)
    policy = replace(plain, peft=get_peft_model(plain.model, settings))
    make_lean(policy.model, policy.device)
    make.move_adapter(policy, 0.1)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


@pytest.mark.parametrize("architecture", ["llama3", "qwen3", "gpt2"])
def test_dora_is_merged_with_its_magnitudes(train_config, tiny_models, monkeypatch, architecture):
    policy = adapted(tiny_models[architecture], train_config(), use_dora=True)
    assert any("lora_magnitude_vector" in name for name, _ in policy.model.named_parameters())
    before, prompts = weights(policy), make.prompts(policy)

    completions = generate(policy, prompts, 3, sampling())
    torch.testing.assert_close(make.reported(completions).logp_N, trained(policy, prompts, completions), **ROUNDING)
    assert_same(weights(policy), before)

    def plain_sum(layer: LoraLinear) -> torch.Tensor:
        return layer.get_base_layer().weight + layer.get_delta_weight("default")

    monkeypatch.setattr(copies, "merged_weight", plain_sum)
    completions = generate(policy, prompts, 3, sampling())
    mismatch_N = (make.reported(completions).logp_N - trained(policy, prompts, completions)).abs()
    assert mismatch_N.max() > 1e-3


def test_an_adapter_with_biases_is_refused(train_config, tiny_models):
    """The sampling copy's layers have the base's biases alone."""
    policy = adapted(tiny_models["llama3"], train_config(), lora_bias=True)
    with pytest.raises(ModelError, match=r"biases.*use rollout\.weights=adapter"):
        generate(policy, make.prompts(policy), 2, sampling())
    generate(policy, make.prompts(policy), 2, sampling(), merge=False)


def test_an_adapter_that_peft_cannot_merge_is_refused(train_config, monkeypatch):
    """Such as aLoRA, which acts on some of the tokens only."""

    class Unmergeable:
        @staticmethod
        def merge_safe(*_: object) -> torch.Tensor:
            raise NotImplementedError

    policy = make.policy(train_config())
    layer = policy.model.get_submodule("model.layers.1.mlp.down_proj")
    layer.lora_variant["default"] = Unmergeable()
    with pytest.raises(ModelError, match=r"\(Unmergeable\) cannot be merged into weights; use rollout\.weights="):
        generate(policy, make.prompts(policy), 2, sampling())
