"""What the in-process engine samples with: what is chosen, and that it is the policy which is trained."""

from dataclasses import replace

import make
import pytest
import torch
from engines import ROUNDING, sampling, trained
from torch import Tensor

from dppo_cli.errors import ConfigError, ModelError
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout import weights
from dppo_cli.rollout.copies import SamplingCopy, base_weight, merged_weight
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.rollout.weights import decide

IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22]])
FREE = 2**30


@pytest.fixture
def free(monkeypatch):
    """Memory that is always there."""
    monkeypatch.setattr(weights, "_free_bytes", lambda _: FREE)


def chosen(kind: str, dtype: str | None, policy: Policy) -> tuple[str, torch.dtype, bool]:
    found = decide(kind, dtype, policy)
    return found.kind, found.dtype, found.copied


# The choice


@pytest.mark.parametrize(
    ("trained_in", "kind", "dtype", "expected"),
    [
        ("float32", "auto", None, ("merged", torch.float32, True)),
        ("float32", "auto", "bfloat16", ("adapter", torch.bfloat16, True)),
        ("bfloat16", "auto", None, ("adapter", torch.bfloat16, False)),
        ("bfloat16", "auto", "float32", ("merged", torch.float32, True)),
        ("float32", "merged", "bfloat16", ("merged", torch.bfloat16, True)),
        ("float32", "adapter", None, ("adapter", torch.float32, False)),
        ("float32", "adapter", "float16", ("adapter", torch.float16, True)),
        ("float32", "quantized", None, ("quantized", torch.float32, True)),
    ],
)
def test_what_is_chosen(train_config, trained_in, kind, dtype, expected):
    policy = replace(make.policy(train_config()), dtype=getattr(torch, trained_in))
    assert chosen(kind, dtype, policy) == expected


@pytest.mark.usefixtures("free")
def test_what_is_chosen_for_a_quantised_base(train_config, monkeypatch):
    policy = make.policy(train_config("adapter=qlora"))
    assert chosen("auto", None, policy) == ("merged", torch.float32, True)
    assert chosen("auto", None, replace(policy, dtype=torch.bfloat16)) == ("dequantized", torch.bfloat16, True)
    assert chosen("dequantized", None, policy) == ("dequantized", torch.float32, True)
    assert chosen("quantized", None, policy) == ("quantized", torch.float32, False)
    # 14 layers: 2 x (2 x 32x32 + 2 x 16x32 + 3 x 64x32) numbers of 4 bytes are more than half of this.
    needed = 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    monkeypatch.setattr(weights, "_free_bytes", lambda _: 2 * needed)
    assert chosen("auto", None, policy) == ("merged", torch.float32, True)
    monkeypatch.setattr(weights, "_free_bytes", lambda _: 2 * needed - 1)
    assert chosen("auto", None, policy) == ("quantized", torch.float32, False)
    assert "auto: a copy would take 0.0 GiB of 0.0 GiB free" in str(decide("auto", None, policy))


def test_the_choice_in_words(train_config):
    policy = make.policy(train_config())
    assert str(decide("auto", None, policy)) == ("weights with the adapter merged in, float32 (auto: exact in float32)")
    assert str(decide("adapter", "bfloat16", policy)) == "weights with the adapter beside them, bfloat16"


@pytest.mark.parametrize(
    ("quantised", "kind", "dtype", "says"),
    [
        (False, "dequantized", None, "rollout.weights=dequantized needs a quantised base"),
        (True, "adapter", None, "use dequantized .* or quantized"),
        (True, "quantized", "bfloat16", "rollout.dtype=bfloat16 needs a copy of the weights"),
        (False, "quantized", "bfloat16", "a 4-bit copy computes in the precision of training; use null"),
    ],
)
def test_what_cannot_be(train_config, quantised, kind, dtype, says):
    adapter = train_config("adapter=qlora" if quantised else "adapter=lora").adapter
    with pytest.raises(ConfigError, match=says):
        LocalRollout(kind, dtype, 8, 8).check(0, adapter)


def test_a_merge_in_16_bits_warns(train_config):
    warned: list[str] = []
    # Here it may be emulated, which is told, too.
    LocalRollout("merged", "bfloat16", 8, 8).load(make.policy(train_config()), warned.append)
    assert warned[-1].startswith("rollout.weights=merged in bfloat16 rounds small updates away")
    LocalRollout("merged", None, 8, 8).load(make.policy(train_config()), make.fail)


# What a copy computes


@torch.no_grad()
def logits(policy: Policy, kind: str, dtype: str | None) -> Tensor:
    found = decide(kind, dtype, policy)
    with SamplingCopy(policy.model, found.dtype, merge=kind == "merged").filled() as sampler, sampler.mode():
        return sampler.model(IDS).logits.float()


@pytest.mark.parametrize("kind", ["merged", "dequantized"])
@pytest.mark.parametrize("targets", ["all-linear", "[q_proj,down_proj]"])
@torch.no_grad()
def test_a_dequantised_copy_is_the_policy_that_is_trained(train_config, kind, targets):
    """Layers without an adapter are quantised, too."""
    policy = make.policy(train_config("adapter=qlora", f"adapter.target_modules={targets}"), adapter_scale=0.1)
    before = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    expected = policy.model(IDS).logits
    torch.testing.assert_close(logits(policy, kind, None), expected, rtol=1e-5, atol=2e-5)
    with policy.without_adapter():
        assert (policy.model(IDS).logits - expected).abs().max() > 0.1, "the adapter made no difference"
    assert torch.equal(policy.model(IDS).logits, expected)
    assert all(torch.equal(p, before[name]) for name, p in policy.model.named_parameters())


def test_a_dequantised_weight_is_not_the_one_that_was_quantised(train_config):
    """So the tests above compare with 4 bits."""
    plain, quantised = make.policy(train_config()), make.policy(train_config("adapter=qlora"))
    name = "model.layers.0.mlp.up_proj"
    weight, rounded = (base_weight(p.model.get_submodule(name)) for p in (plain, quantised))
    assert weight.shape == rounded.shape and rounded.dtype == torch.float32
    assert 0.01 < (weight - rounded).abs().mean() < 0.1
    assert len(rounded.unique()) < 0.7 * len(weight.unique())


@torch.no_grad()
def test_a_merge_in_bfloat16_swallows_small_updates(train_config):
    """As the trainer's own weights and the adapter beside them do not."""
    policy = make.policy(train_config(), adapter_scale=0.001)
    layer = policy.model.get_submodule("model.layers.0.mlp.up_proj")
    weight, delta = layer.base_layer.weight, layer.get_delta_weight("default")
    assert delta.abs().mean() < 0.002 * weight.abs().mean()

    def kept(dtype: torch.dtype) -> float:
        change = merged_weight(layer).to(dtype).float() - weight.to(dtype).float()
        same_sign_and_size = (change - delta).abs() < 0.5 * delta.abs()
        return float(same_sign_and_size.float().mean())

    assert kept(torch.float32) > 0.99
    assert kept(torch.bfloat16) < 0.3
    copy = SamplingCopy(policy.model, torch.bfloat16, merge=False)
    own, theirs = (dict(model.named_parameters()) for model in (policy.model, copy.model))
    adapters = [name for name in own if "lora_" in name]
    assert len(adapters) == 28 and all(theirs[name] is own[name] for name in adapters)
    with copy.filled() as sampler:
        base = sampler.model.get_submodule("model.layers.0.mlp.up_proj").base_layer.weight
        assert torch.equal(base, weight.bfloat16())


@torch.no_grad()
def test_in_bfloat16_the_sampler_is_the_trainer(train_config):
    """By default; merged, it is another policy."""
    policy = make.policy(train_config("hardware.dtype=bfloat16"), adapter_scale=0.1)
    assert decide("auto", None, policy).copied is False
    with policy.autocast():
        expected = policy.model(IDS).logits.float()
    torch.testing.assert_close(logits(policy, "adapter", None), expected, rtol=0, atol=0)
    assert (logits(policy, "merged", None) - expected).abs().max() > 0.01


@pytest.mark.parametrize("kind", ["auto", "dequantized", "quantized"])
def test_qlora_reports_the_log_probs_of_the_weights_that_sampled(train_config, kind):
    policy = make.policy(train_config("adapter=qlora"), adapter_scale=0.1)
    prompts = make.prompts(policy)
    with LocalRollout(kind, None, 512, 8).load(policy, make.fail) as engine:
        engine.sync(0)
        completions = in_order(engine.generate(prompts, 3, sampling(), 0, seed=1))
    mu_N = make.reported(completions).logp_N
    torch.testing.assert_close(mu_N, trained(policy, prompts, completions), **ROUNDING)


@torch.no_grad()
def test_a_plain_base_in_4_bits_is_that_of_qlora(train_config):
    """With the adapter beside it; its log-probs are reported, and are not those of the policy."""
    policy = make.policy(train_config(), adapter_scale=0.1)
    quantised = make.policy(train_config("adapter=qlora"), adapter_scale=0.1)
    copy = SamplingCopy(policy.model, torch.float32, merge=False, quantize=True)
    with copy.filled() as sampler, sampler.mode():
        found = sampler.model(IDS).logits
    torch.testing.assert_close(found, quantised.model(IDS).logits, rtol=1e-5, atol=2e-5)
    assert (found - policy.model(IDS).logits).abs().max() > 0.1
    with pytest.raises(ModelError, match="Conv1D layers have no kind of 4 bits"):
        SamplingCopy(make.policy(train_config(model="gpt2")).model, torch.float32, merge=False, quantize=True)
    prompts = make.prompts(policy)
    with LocalRollout("quantized", None, 512, 8).load(policy, make.fail) as engine:
        engine.sync(0)
        completions = in_order(engine.generate(prompts, 3, sampling(), 0, seed=1))
    mu_N = make.reported(completions).logp_N
    torch.testing.assert_close(mu_N, trained(quantised, prompts, completions), **ROUNDING)
    assert (mu_N - trained(policy, prompts, completions)).abs().mean() > 0.01


def test_copied_weights_are_freed_after_sampling(train_config):
    policy = make.policy(train_config("adapter=qlora"))
    copy = SamplingCopy(policy.model, torch.float32, merge=False)

    def held() -> int:
        return sum(target.weight.numel() for _, target in copy.fills)

    assert held() == 0 and len(copy.fills) == 14
    with copy.filled():
        assert held() == 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32)
    assert held() == 0
