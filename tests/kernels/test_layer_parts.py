"""What layers consist of, and how far they see, by family."""

import copy

import pytest
import tiny
import tiny_models
import torch
from test_token_step import FAMILIES, WINDOWS, model
from transformers import AutoModelForCausalLM, BambaConfig

from dppo_cli.kernels.layer_parts import is_known, parts_of, sees_all, windows_of

ROTATED = {"smollm3": [True, False]}
NAMES = {
    "olmo2": [None, "post_attention_layernorm", None, "post_feedforward_layernorm"],
    "gemma3": [
        *("input_layernorm", "post_attention_layernorm"),
        *("pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ],
}


@pytest.mark.parametrize("family", list(FAMILIES))
def test_parts_are_the_modules_of_the_layer(family):
    of = model(FAMILIES[family])
    assert is_known(of)
    for layer, rotates in zip(of.base_model.layers, ROTATED.get(family, [True, True]), strict=True):
        parts = parts_of(layer, of.config)
        names = {id(module): name for name, module in layer.named_modules()}
        found = [None if norm is None else names[id(norm)] for norm in parts.norms]
        assert found == NAMES.get(family, ["input_layernorm", None, "post_attention_layernorm", None])
        linear = {id(m) for m in layer.modules() if isinstance(m, torch.nn.Linear)}
        assert {id(m) for m in (*parts.qkv, parts.o_proj, *parts.gate_up, parts.down_proj)} == linear
        assert sum(m.out_features for m in parts.qkv) == sum(parts.qkv_sizes)
        assert parts.qkv_sizes[1] == parts.qkv_sizes[2] == parts.head_size * of.config.num_key_value_heads
        assert parts.rotates is rotates and parts.scale == pytest.approx(8**-0.5)
    kinds = {parts_of(layer, of.config).angles for layer in of.base_model.layers}
    assert kinds == ({"sliding_attention", "full_attention"} if family == "gemma3" else {None})


@pytest.mark.parametrize(
    ("family", "expected"),
    [("gemma3 with a window", [6, None]), ("mistral with a window", [6, 6]), ("qwen2 with a window", [None, 6])],
)
def test_how_far_a_layer_sees(family, expected):
    of = model(WINDOWS[family])
    assert windows_of(of) == expected
    assert sees_all(of, 6) and not sees_all(of, 7)


def test_layers_without_a_window_see_all():
    of = model(FAMILIES["llama"])
    assert windows_of(of) == [None, None] and sees_all(of, 10**9)


def test_other_states_than_keys_and_values_show_nothing():
    config = BambaConfig(**tiny.GROUPED, vocab_size=96, mamba_n_heads=4, mamba_d_head="auto", attn_layer_indices=[1])
    of = AutoModelForCausalLM.from_config(config)
    assert windows_of(of) is None and not sees_all(of, 1) and not is_known(of)


@pytest.mark.parametrize("key", ["attn_logit_softcapping", "use_bidirectional_attention"])
def test_another_attention_is_not_known(key):
    of = model(FAMILIES["gemma3"])
    assert is_known(of)
    of.config = copy.deepcopy(of.config)
    setattr(of.config, key, 5.0 if key.startswith("attn") else True)
    assert not is_known(of)
    assert not is_known(AutoModelForCausalLM.from_config(tiny_models.FAMILIES["gemma2"]))
