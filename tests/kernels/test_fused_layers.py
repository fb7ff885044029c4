"""Models whose modules use the kernels against the same models with plain modules."""

import copy
import pickle
from collections import Counter

import interpreted
import make
import pytest
import tiny
import torch
from compiled import taken
from test_token_step import FAMILIES, PADDED, decoder
from test_token_step import model as random_model
from transformers import AutoModelForCausalLM

from dppo_cli.kernels import probe
from dppo_cli.kernels.fuse import WITHOUT_FUSED, fuse
from dppo_cli.kernels.layer_parts import is_known
from dppo_cli.kernels.segments import Segments
from dppo_cli.kernels.token_step import Plain, TokenStep
from dppo_cli.policy.forward import hidden_states, packed_states
from dppo_cli.policy.packed_forward import can_pack
from dppo_cli.policy.policy import Policy

layers = interpreted.kernels("layers")
CPU, BFLOAT16 = torch.device("cpu"), torch.bfloat16
KERNELS = ("rms_norm", "rotate", "swiglu", "geglu", "add_and_norm", "norm_and_rotate")


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Lets the CPU, where Triton's interpreter runs them, count as a device for the kernels; how often each ran."""
    counts: Counter = Counter()
    monkeypatch.setattr(layers, "DEVICES", ("cpu",))

    def counted(name, run):
        def call(*args):
            counts[name] += 1
            return run(*args)

        return call

    for name in KERNELS:
        monkeypatch.setattr(layers, name, counted(name, getattr(layers, name)))
    return counts


def fused(model: torch.nn.Module, used: Counter) -> torch.nn.Module:
    made = copy.deepcopy(model)
    layers.make_fused(made)
    used.clear()  # of the probe's
    return made


def frozen(family: str, dtype: torch.dtype = BFLOAT16) -> torch.nn.Module:
    return random_model(FAMILIES[family]).to(dtype).requires_grad_(False)


def policy(train_config, *words: str, model: str) -> Policy:
    of = make.policy(train_config("hardware.dtype=bfloat16", *words, model=model), adapter_scale=0.3)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in of.model.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1, 0.3, generator=generator)
    return of


def gradients(of: Policy, run) -> tuple[torch.Tensor, list[torch.Tensor]]:
    hidden = run(of)
    (hidden.float() * hidden.detach().float().cos()).sum().backward()
    found = [p.grad for p in of.parameters]
    for parameter in of.parameters:
        parameter.grad = None
    return hidden.detach(), found


def whole(of: Policy) -> torch.Tensor:
    return hidden_states(of, torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]]))


def packed(of: Policy) -> torch.Tensor:
    assert can_pack(of.model)
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
    return packed_states(of, ids, torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5]]), Segments((3,), ((2, 3),)))


@pytest.mark.parametrize("run", [whole, packed])
@pytest.mark.parametrize("words", [(), ("hardware.gradient_checkpointing=true",)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_states_and_gradients_have_the_same_bits(model, words, run, train_config, used):
    of = policy(train_config, *words, model=model)
    expected, right = gradients(of, run)
    layers.make_fused(of.model)
    used.clear()
    found, grads = gradients(of, run)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(grads) == 28 and all(grad.any() for grad in grads)
    for grad, other in zip(grads, right, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=0)
    # A forward pass of two layers, and another one of them to recompute.
    norms = (2, 4)[model == "qwen3"]
    times = 1 + bool(words)
    assert used == {"rms_norm": 2 * norms * times + 1, "rotate": 2 * times, "swiglu": 2 * times}


def test_the_model_stays_what_it_was(train_config, used):
    of = policy(train_config, model="qwen3").model
    before = copy.deepcopy(of)
    layers.make_fused(of)
    assert list(of.state_dict()) == list(before.state_dict())
    assert is_known(of)
    for (name, module), (other, plain) in zip(of.named_modules(), before.named_modules(), strict=True):
        assert name == other and isinstance(module, type(plain))
    kinds = Counter(type(m).__name__ for m in of.modules() if "Fused" in type(m).__name__)
    assert kinds == {"FusedQwen3RMSNorm": 9, "FusedQwen3MLP": 2, "FusedQwen3Attention": 2}
    for again in (copy.deepcopy(of), pickle.loads(pickle.dumps(of.base_model.layers[0]))):
        names = {type(m) for m in again.modules()}
        assert set(layers.KINDS.values()) & names == {
            layers.FusedQwen3RMSNorm,
            layers.FusedQwen3MLP,
            layers.FusedQwen3Attention,
        }
    recorded = {kind.__name__ for kind in before.base_model._can_record_outputs.values()}
    assert recorded == {"Qwen3DecoderLayer", "Qwen3Attention"}
    hidden = of.base_model(torch.tensor([[5, 6, 7]]), output_hidden_states=True).hidden_states
    assert len(hidden) == 3


STEPS: dict[str, dict[str, int]] = {
    "qwen3": {"norm_and_rotate": 4},  # this one has another activation, too
    # One of two layers is rotated.
    "smollm3": {"rotate": 2, "swiglu": 4},
    # Norms of queries and keys, of what is added, and of nothing before the first product.
    "olmo2": {"rms_norm": 16, "add_and_norm": 2, "rotate": 4, "swiglu": 4},
    "gemma3": {"rms_norm": 10, "norm_and_rotate": 4, "geglu": 4},
}
"""Launches in two steps of two layers, where they are not those of Llama."""


@pytest.mark.parametrize("family", list(FAMILIES))
@torch.inference_mode()
def test_a_decoding_step_has_the_same_bits(family, used):
    plain = frozen(family)
    of = fused(plain, used)
    ours, theirs = decoder(of, PADDED), decoder(plain, PADDED)
    torch.testing.assert_close(ours.prefill(), theirs.prefill(), rtol=0, atol=0)
    used.clear()
    assert isinstance(ours.short_cut.operations, layers.Fused) and isinstance(theirs.short_cut.operations, Plain)
    for token_A in ([5, 6, 7, 8], [9, 10, 11, 12]):
        found, expected = (each.step(torch.tensor(token_A)) for each in (ours, theirs))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for mine, other in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, rtol=0, atol=0)
    assert used == {**{"rms_norm": 2, "add_and_norm": 8}, **STEPS.get(family, {"rotate": 4, "swiglu": 4})}


@torch.inference_mode()
def test_a_copy_in_float32_steps_in_plain_operations(used):
    of = fused(frozen("llama"), used)
    assert isinstance(TokenStep(of.float()).operations, Plain)


@torch.no_grad()
def test_other_inputs_take_the_way_of_transformers(used):
    of = frozen("qwen3", torch.float32)
    expected = of(torch.tensor([[5, 6, 7]])).logits
    made = fused(of, used)
    torch.testing.assert_close(made(torch.tensor([[5, 6, 7]])).logits, expected, rtol=0, atol=0)
    assert not used
    trained = fused(frozen("llama"), used)
    for name, parameter in trained.named_parameters():
        parameter.requires_grad_("norm" in name)
    with torch.enable_grad():
        trained(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert "rms_norm" not in used and used["rotate"] == used["swiglu"] == 2
    assert all(p.grad.any() for name, p in trained.named_parameters() if "norm" in name)


def test_another_activation_stays_plain(used):
    of = fused(frozen("qwen3"), used)
    assert not any(isinstance(m, layers._MLP) for m in of.modules())
    of(torch.tensor([[5, 6, 7]]))
    assert used == {"rms_norm": 9, "rotate": 2}


def test_attention_that_calls_its_rotation_by_another_name_stays_as_it_is(monkeypatch):
    class Attention(torch.nn.Module):
        def forward(self, x):
            return x

    assert layers._with_rotation(Attention, wide=False) is None
    wrapped = staticmethod(print)
    monkeypatch.setattr(Attention, "forward", wrapped)
    assert layers._with_rotation(Attention, wide=False) is None


# Bytes that are kept for the backward pass


def kept_per_token(of: Policy, tokens: int = 16) -> float:
    parameters, sizes = {p.data_ptr() for p in of.model.parameters()}, {}

    def keep(tensor):
        if tensor.data_ptr() not in parameters:
            sizes[tensor.untyped_storage().data_ptr(), tensor.dtype] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        hidden = hidden_states(of, torch.arange(3, 3 + tokens)[None])
    del hidden
    return sum(sizes.values()) / tokens


@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_bytes_that_are_kept(model, train_config, used):
    """Of a layer, in 16 bits: both norms' inputs and outputs, q, k, v, what is attended to, gate, up, their product."""
    of = policy(train_config, "adapter.r=4", model=model)
    plain = kept_per_token(of)
    layers.make_fused(of.model)
    found = kept_per_token(of)
    hidden, queries, keys, inner, heads, size = 32, 32, 16, 64, 4, 8
    layer = 2 * (4 * hidden + 2 * queries + 2 * keys + 3 * inner)
    layer += 2 * 7 * 4 + 4 * heads + 4 * 2  # A's products of seven adapters; a number in float32 for each head and norm
    if model == "qwen3":  # norms of heads
        layer += 2 * (queries + keys) + 4 * (4 + 2)
    # The first norm reads what needs no gradient; the last one does not. cos and sin are those of all layers.
    assert found == 2 * layer + 2 * 2 * size
    # Plain modules keep what they norm in float32, and silu(gate).
    normed = 2 * hidden + (queries + keys if model == "qwen3" else 0)
    assert plain == found + 2 * 2 * (normed + inner)


# Whether they are used


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_other_families_are_not_looked_at(family, monkeypatch):
    monkeypatch.setattr("dppo_cli.kernels.fuse.without_triton", make.fail)
    fuse(AutoModelForCausalLM.from_config(tiny.CONFIGS[family]), CPU, BFLOAT16, make.fail)


def test_a_cpu_has_plain_modules():
    of = frozen("llama")
    fuse(of, CPU, BFLOAT16, make.fail)
    assert not any(type(m) in layers.KINDS.values() for m in of.modules())


def test_without_triton_it_is_said(monkeypatch):
    monkeypatch.setattr("dppo_cli.kernels.fuse.without_triton", lambda *_: probe.NO_TRITON)
    said = []
    fuse(frozen("llama"), CPU, BFLOAT16, said.append)
    assert said == [WITHOUT_FUSED.format("Triton is not installed")]


OFF = [(name, "llama") for name in ("rms_norm", "rotate", "swiglu", "add_and_norm")]
OFF += [("norm_and_rotate", "qwen3"), ("rotate", "phi3"), ("rms_norm", "olmo2"), ("geglu", "gemma3")]


@pytest.mark.parametrize(("name", "family"), OFF)
def test_a_kernel_that_is_off_is_not_used_and_that_is_said(name, family, monkeypatch):
    monkeypatch.setattr("dppo_cli.kernels.fuse.without_triton", lambda *_: None)
    run = getattr(layers, name)

    def off(*args):
        out = run(*args)
        return tuple(1.1 * x for x in out) if isinstance(out, tuple) else 1.1 * out

    of, said = frozen(family), []
    fuse(of, CPU, BFLOAT16, make.fail)
    assert any(type(m) in layers.KINDS.values() for m in of.modules())
    monkeypatch.setattr(layers, name, off)
    of = frozen(family)
    fuse(of, CPU, BFLOAT16, said.append)
    assert len(said) == 1 and "its results are 0." in said[0]
    assert not any(type(m) in layers.KINDS.values() for m in of.modules())


def test_all_families_where_there_is_no_model(monkeypatch):
    comparison = interpreted.kernels("comparison")
    families = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2", "gemma3_text")
    assert tuple(kind.model_type for kind in comparison.CONFIGS) == families
    assert 0 <= comparison.difference_in_all_families(CPU, BFLOAT16) <= comparison.CLOSE
    right = layers.geglu
    monkeypatch.setattr(layers, "geglu", lambda *of: 1.1 * right(*of))
    assert comparison.difference_in_all_families(CPU, BFLOAT16) > comparison.CLOSE


# What the kernels take of a GPU


def test_compiled_for_gpus():
    """Registers for full occupancy: 2,048 threads of an SM's 65,536 registers have 32 each, 1,024 have 64."""
    found = taken("specimens_llama_layers")
    assert len(found) == 13
    for name, of in found.items():
        for capability, one in of.items():
            assert one["spilled"] == 0 and one["shared"] <= 256, f"{name} on {capability}: {one}"
            assert one["registers"] <= 48, f"{name} on {capability}: {one}"
