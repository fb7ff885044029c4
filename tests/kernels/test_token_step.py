"""The short cut against transformers' own forward pass of the same models."""

import copy

import make
import pytest
import tiny
import tiny_models
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from dppo_cli.kernels.layer_parts import is_known
from dppo_cli.kernels.token_step import _norm
from dppo_cli.policy.forward import hidden_states
from dppo_cli.rollout.decoder import Decoder, compact

CPU = torch.device("cpu")
SIZES = dict(tiny.GROUPED, vocab_size=96)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**{**SIZES, "num_key_value_heads": 4, "hidden_act": "gelu"}),
    # See tiny_models for what is peculiar to these.
    **{name: tiny_models.FAMILIES[name] for name in ("phi3", "smollm3", "olmo2")},
    "gemma3": Gemma3TextConfig(**{**tiny_models.GEMMA3.to_dict(), "sliding_window": 64}),
}
WINDOWS: dict[str, PretrainedConfig] = {
    "gemma3 with a window": tiny_models.GEMMA3,
    "mistral with a window": MistralConfig(**SIZES, sliding_window=6),
    "qwen2 with a window": Qwen2Config(**SIZES, sliding_window=6, use_sliding_window=True, max_window_layers=1),
}
"""Of 6 positions, in all layers or in some."""
EVEN = ((5, 6, 7), (8, 9, 10))
PADDED = ((5, 6, 7, 8, 9), (10, 11))


def model(config: PretrainedConfig, **more):
    torch.manual_seed(0)
    # transformers writes the attention that it chose into the config.
    made = AutoModelForCausalLM.from_config(copy.deepcopy(config), **more).eval()
    for parameter in made.parameters():
        parameter.data.normal_(0, 0.3)  # biases and norms, too, which start at zero and one
    return made


def decoder(of, token_ids) -> Decoder:
    return Decoder(of, [make.prompt(i, ids) for i, ids in enumerate(token_ids)], 2, 8, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("token_ids", [EVEN, PADDED], ids=["even", "padded"])
@pytest.mark.parametrize("family", list(FAMILIES))
@torch.inference_mode()
def test_a_step_is_that_of_transformers(family, token_ids, dtype):
    of = model(FAMILIES[family]).to(dtype)
    ours, theirs = decoder(of, token_ids), decoder(of, token_ids)
    assert ours.short_cut is not None
    theirs.short_cut = None
    # float32 within the rounding of attention, whose sums may be in another order; bfloat16 within that of one weight.
    close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.02, atol=0.02)
    torch.testing.assert_close(ours.prefill(), theirs.prefill(), rtol=0, atol=0)
    generator = torch.Generator().manual_seed(0)
    for writing in ([1, 1, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1], [1, 0, 1], [1, 1]):
        rows = compact(torch.tensor(writing).bool(), CPU)
        token_A = torch.randint(3, 96, (len(rows.kept_A),), generator=generator)
        for each in (ours, theirs):
            each.keep(rows)
        found_AH = ours.step(token_A)
        assert found_AH.dtype == dtype
        torch.testing.assert_close(found_AH, theirs.step(token_A), **close)
    for mine, other in zip(ours.cache.layers, theirs.cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, other.keys, **close)
        torch.testing.assert_close(mine.values, other.values, **close)


@pytest.mark.parametrize(
    "config",
    [
        *(tiny.CONFIGS[name] for name in ("gpt2", "gemma2", "cohere2")),
        *WINDOWS.values(),
        Gemma3TextConfig(**{**tiny_models.GEMMA3.to_dict(), "sliding_window": 64, "attn_logit_softcapping": 5.0}),
    ],
    ids=["gpt2", "gemma2", "cohere2", *WINDOWS, "gemma3 with a soft cap"],
)
def test_other_models_go_through_transformers(config):
    assert decoder(model(config), EVEN).short_cut is None


def test_another_attention_than_torchs_goes_through_transformers():
    assert not is_known(model(FAMILIES["llama"], attn_implementation="eager"))


@torch.no_grad()
def test_an_adapter_that_is_not_merged_takes_part(train_config):
    policy = make.policy(train_config(), adapter_scale=0.3)
    ids = (*EVEN[0], 11)
    short = decoder(policy.model, [EVEN[0]])
    assert short.short_cut is not None
    short.prefill()
    expected_H = hidden_states(policy, torch.tensor([ids]))[0, -1]
    torch.testing.assert_close(short.step(torch.tensor([11, 11]))[0], expected_H, rtol=1e-5, atol=1e-5)
    with policy.without_adapter():
        base_H = hidden_states(policy, torch.tensor([ids]))[0, -1]
    assert (base_H - expected_H).abs().max() > 0.01, "the adapter has an effect here"


NORMS = {"llama": LlamaRMSNorm, "olmo2": Olmo2RMSNorm, "gemma3": Gemma3RMSNorm}


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("family", list(NORMS))
def test_the_norm_is_that_of_transformers(family, scale):
    """Against float64; at a scale of 1e-3 eps has as much to say as x."""
    generator = torch.Generator().manual_seed(0)
    module = NORMS[family](576, eps=1e-6)
    module.weight.data.normal_(1, 0.3, generator=generator)
    x = scale * torch.randn(8, 1, 576, generator=generator)
    weight = copy.deepcopy(module).double().weight + (family == "gemma3")
    variance = x.double().square().mean(-1, keepdim=True)
    expected = weight * x.double() / (variance + 1e-6).sqrt()
    found = _norm(module)(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, module(x), rtol=1e-6, atol=0)
    assert _norm(module.to(torch.bfloat16)) is module, "transformers rounds between the steps there"
