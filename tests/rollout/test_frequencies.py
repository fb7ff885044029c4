"""Rotary frequencies that depend on the longest sequence, and those that do not."""

import pytest
import tiny
import tiny_models
from transformers import AutoModelForCausalLM, LlamaConfig

from dppo_cli.errors import ModelError
from dppo_cli.rollout.frequencies import are_fixed, check_length

LIMIT = tiny_models.LONGROPE_LIMIT


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "smollm3", "olmo2", "gemma3", "mistral_window"])
def test_which_are_fixed(family):
    of = AutoModelForCausalLM.from_config(tiny_models.FAMILIES[family])
    assert are_fixed(of)
    for prompt, new in ((1, LIMIT - 1), (LIMIT - 1, 1)):
        check_length(of, prompt, new)
    if family != "phi3":
        check_length(of, LIMIT, 1)
        return
    with pytest.raises(ModelError, match=f"beyond {LIMIT} .longrope., and prompts of up to 2 tokens with sampling.max"):
        check_length(of, 2, LIMIT - 1)


def test_which_are_not():
    rope = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    of = AutoModelForCausalLM.from_config(LlamaConfig(**tiny.GROUPED, vocab_size=96, rope_parameters=rope))
    assert not are_fixed(of)
    assert not are_fixed(AutoModelForCausalLM.from_config(tiny.CONFIGS["gpt2"])), "it has none"
    gemma = AutoModelForCausalLM.from_config(tiny_models.FAMILIES["gemma3"])
    gemma.base_model.rotary_emb.rope_type["full_attention"] = "dynamic"
    assert not are_fixed(gemma)
