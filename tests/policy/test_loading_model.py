"""What is loaded: weights, device and precision, dropout, and a head that gives the model's own log-probs."""

import json
from dataclasses import replace

import make
import pytest
import tiny
import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, OPTConfig

from dppo_cli.errors import ConfigError, ModelError
from dppo_cli.kernels.low_rank import LeanLoraLinear, lean_4_bit
from dppo_cli.policy import loading
from dppo_cli.policy.forward import hidden_states
from dppo_cli.policy.loading import check_head, resolve_device

IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22]])


def test_a_plain_model_is_frozen_and_as_saved(load, tiny_models):
    policy = load(tiny_models["llama3"])
    assert (policy.peft, policy.parameters, policy.model.training) == (None, [], False)
    assert (policy.dtype, policy.device.type, policy.pad_id) == (torch.float32, "cpu", 0)
    saved = load_file(tiny_models["llama3"] / "model.safetensors")
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, saved[name])


def test_the_end_of_sequence_tokens_of_model_and_tokenizer(load, folder):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": [7, 9]}))
    policy = load(folder)
    assert policy.eos_ids == (7, 9, 1)
    assert policy.pad_id == 0


def test_without_padding_token_the_first_end_serves(load, folder):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load(folder).pad_id == 1


# Device and precision


def test_a_gpu_that_is_not_there(train_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hardware = train_config().hardware
    with pytest.raises(ConfigError, match=r"hardware\.device=cuda, but torch sees no GPU"):
        resolve_device(replace(hardware, device="cuda"))
    assert resolve_device(replace(hardware, device="auto")) == (torch.device("cpu"), torch.float32)
    assert resolve_device(replace(hardware, dtype="bfloat16")) == (torch.device("cpu"), torch.bfloat16)


def test_a_gpu_trains_in_bfloat16(train_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    hardware = train_config().hardware
    assert resolve_device(replace(hardware, device="auto")) == (torch.device("cuda"), torch.bfloat16)
    assert resolve_device(replace(hardware, device="cuda", dtype="float32")) == (torch.device("cuda"), torch.float32)
    assert resolve_device(replace(hardware, device="cpu")) == (torch.device("cpu"), torch.float32)


def test_apples_gpu_is_used_only_where_it_is_named(train_config, monkeypatch, load, tiny_models):
    hardware = replace(train_config().hardware, device="mps")
    with pytest.raises(ConfigError, match=r"hardware\.device=mps, but torch sees no Apple GPU here; use hardware=cpu"):
        resolve_device(hardware)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device(hardware) == (torch.device("mps"), torch.float32)
    assert resolve_device(replace(hardware, dtype="bfloat16")) == (torch.device("mps"), torch.bfloat16)
    assert resolve_device(replace(hardware, device="auto")) == (torch.device("cpu"), torch.float32)
    adapter = replace(train_config().adapter, quantization="nf4")
    with pytest.raises(
        ConfigError, match=r"quantization=nf4 needs bitsandbytes.*hardware\.device=mps; use adapter=lora"
    ):
        load(tiny_models["llama3"], adapter, device="mps")


def test_settings_of_the_device_come_before_its_weights(load, tiny_models, monkeypatch):
    order, load_model = [], loading._load_model
    monkeypatch.setattr(loading, "set_up", lambda device: order.append(device.type))
    monkeypatch.setattr(loading, "_load_model", lambda *of: order.append("weights") or load_model(*of))
    load(tiny_models["llama3"])
    assert order == ["cpu", "weights"]


@pytest.mark.parametrize("emulated", [True, False])
def test_bfloat16_on_a_processor_without_it_warns(load, tiny_models, monkeypatch, emulated):
    asked, warnings = [], []
    monkeypatch.setattr(loading, "emulates_bfloat16", lambda *where: asked.append(where) or emulated)
    policy = load(tiny_models["llama3"], dtype="bfloat16", warn=warnings.append)
    assert asked == [(policy.device, policy.dtype)] == [(torch.device("cpu"), torch.bfloat16)]
    assert [text.split(";")[1].strip() for text in warnings] == (["use hardware.dtype=float32"] if emulated else [])
    assert all("hardware.dtype=bfloat16 on a processor without bfloat16" in text for text in warnings)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_lean_layers(load, tiny_models, train_config, monkeypatch, device, adapter):
    """On a CPU PEFT's layers stay on a 4-bit base. The weights of this test are on the CPU all the same."""
    load_model = loading._load_model

    def on_the_cpu(location, path, of, file, dtype, device, quantization, warn):
        return load_model(location, path, of, file, dtype, torch.device("cpu"), quantization, warn)

    monkeypatch.setattr(loading, "_load_model", on_the_cpu)
    monkeypatch.setattr(loading, "resolve_device", lambda _: (torch.device(device), torch.float32))
    monkeypatch.setattr(loading, "check_head", lambda _: None)
    policy = load(tiny_models["llama3"], train_config(f"adapter={adapter}").adapter)
    assert policy.device.type == device
    expected = LeanLoraLinear if adapter == "lora" else lean_4_bit()[device == "cuda"]
    assert {type(m) for m in policy.model.modules() if isinstance(m, LoraLinear | lean_4_bit()[0])} == {expected}


# Dropout


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_dropout_of_the_base_is_removed(load, train_config, tiny_models, tmp_path, kind):
    """GPT-2 has it as modules, OPT as numbers given to a function. Checkpointing trains in train mode."""
    path = tiny_models["gpt2"]
    if kind == "opt":
        path = tmp_path
        size = dict(hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4)
        rates = dict(dropout=0.5, attention_dropout=0.5, layerdrop=0.5)
        config = OPTConfig(vocab_size=96, max_position_embeddings=64, eos_token_id=1, **size, **rates)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
        tiny.tokenizer().save_pretrained(path)
    policy = load(path, train_config().adapter, gradient_checkpointing=True)
    assert policy.model.training
    first = hidden_states(policy, IDS)
    assert torch.equal(hidden_states(policy, IDS), first)
    policy.model.eval()
    assert torch.equal(hidden_states(policy, IDS), first)


def test_dropout_of_the_adapter_stays(load, train_config, tiny_models):
    policy = load(tiny_models["gpt2"], replace(train_config().adapter, dropout=0.5))
    make.move_adapter(policy, 0.3)
    assert policy.model.training
    assert not torch.equal(hidden_states(policy, IDS), hidden_states(policy, IDS))


# The head


def test_logits_that_the_head_cannot_reproduce_are_refused(load, tiny_models, monkeypatch):
    policy = load(tiny_models["llama3"])
    check_head(policy)
    hook = policy.model.lm_head.register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(ModelError, match="LlamaForCausalLM changes its logits in a way this version cannot reproduce"):
        check_head(policy)
    hook.remove()
    check_head(policy)

    original = LlamaForCausalLM.forward

    def shifted(self, *args, **kwargs):
        output = original(self, *args, **kwargs)
        output.logits[..., 7] += 0.01
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", shifted)
    with pytest.raises(ModelError, match=r"log-probs differ by 0\.01"):
        load(tiny_models["llama3"])


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
def test_the_check_allows_for_a_lower_precision(load, tiny_models, monkeypatch, architecture):
    monkeypatch.setattr(loading, "emulates_bfloat16", lambda *_: False)  # no warning, whatever this processor has
    policy = load(tiny_models[architecture], dtype="bfloat16")
    assert policy.dtype == policy.head.weight_VH.dtype == torch.bfloat16
