"""Loading: what a folder or a name must hold, what the adapter may touch, and that nothing broken loads quietly."""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import make
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM, OPTConfig

from dppo_cli.config import TrainConfig
from dppo_cli.data.task import Example
from dppo_cli.errors import ConfigError, ModelError
from dppo_cli.learner import Learner
from dppo_cli.policy import loading
from dppo_cli.policy.loading import load_policy, resolve_device, resolve_path
from dppo_cli.policy.policy import Policy, check_head
from dppo_cli.sections import LoRA, Prompting

IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22]])


@pytest.fixture
def folder(tiny_models, tmp_path) -> Path:
    """A tiny model of one's own, to damage."""
    return Path(shutil.copytree(tiny_models["llama3"], tmp_path / "model"))


@pytest.fixture
def load(train_config) -> Callable[..., Policy]:
    config: TrainConfig = train_config()

    def loaded(path: Path | str, adapter: LoRA | None = None, **hardware) -> Policy:
        return load_policy(str(path), None, replace(config.hardware, **hardware), new_adapter=adapter)

    return loaded


# Folders and names


def test_a_folder_that_is_not_there(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no model folder \./nowhere \(in .*\)"):
        load("./nowhere")
    for path in (str(tmp_path / "nowhere"), "nowhere", "a/b/c", "~/model"):
        with pytest.raises(ModelError, match="no model folder"):
            resolve_path(path)


def test_a_folder_without_weights(load, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\)$"):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pickled \.bin weights are not read; convert them"):
        load(folder)


def test_a_folder_without_tokenizer(load, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer\.json\); copy it"):
        load(folder)


def test_a_folder_without_config(load, folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_file_that_is_no_json(load, folder, name):
    (folder / name).write_text("{garbage")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_weights_that_were_cut_off(load, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"the weights in .* cannot be loaded: .*incomplete"):
        load(folder)


def test_a_tensor_that_is_missing_is_not_drawn_at_random(load, folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of the model's tensors, such as model\.layers\.1\.mlp\.up_proj"):
        load(folder)


def test_a_tensor_of_another_shape(load, folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_an_architecture_that_is_not_known(load, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(ModelError, match="nonsense"):
        load(folder)


def test_an_embedded_model_that_is_not_there():
    with pytest.raises(ModelError, match=r"there is no embedded model 'arithmetic_9m'. Choices: "):
        resolve_path("embedded:arithmetic_9m")


def test_a_name_on_the_hub_is_left_as_it_is():
    assert resolve_path("HuggingFaceTB/SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> None:
    """Nothing downloaded before is found."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_name_on_the_hub_offline(load, empty_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError,
        match=r"found no tokenizer of somebody/model-7b.*`hf download somebody/model-7b --local-dir model-7b`",
    ) as error:
        load("somebody/model-7b")
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_costs_a_moment(load, empty_cache, monkeypatch):
    """huggingface_hub would wait and try again for half a minute over each file."""

    class Silence:
        def head(self, url: str, timeout: float) -> None:
            assert timeout <= 10
            raise TimeoutError

    monkeypatch.setattr(loading, "get_session", Silence)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s to try again"))
    with pytest.raises(ModelError, match="found no tokenizer of somebody/model-7b"):
        load("somebody/model-7b")


def test_a_folder_needs_no_hub(load, folder, monkeypatch):
    monkeypatch.setattr(loading, "get_session", lambda: pytest.fail("asked the hub"))
    assert load(folder).eos_ids == (1,)


# What is loaded


def test_a_plain_model_is_frozen_and_as_saved(load, tiny_models):
    policy = load(tiny_models["llama3"])
    assert (policy.peft, policy.parameters, policy.model.training) == (None, [], False)
    assert (policy.dtype, policy.device.type, policy.pad_id) == (torch.float32, "cpu", 0)
    saved = load_file(tiny_models["llama3"] / "model.safetensors")
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, saved[name])


def test_a_fresh_adapter_changes_nothing_and_follows_the_seed(load, tiny_models, train_config):
    config = train_config()
    plain = load(tiny_models["llama3"])

    def adapted(seed: int) -> Policy:
        return load_policy(config.model.path, None, config.hardware, new_adapter=config.adapter, seed=seed)

    one, again, other = adapted(1), adapted(1), adapted(2)
    assert torch.equal(one.hidden_states(IDS), plain.hidden_states(IDS))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, again.parameters, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters, other.parameters, strict=True))
    names = [name for name, parameter in one.model.named_parameters() if parameter.requires_grad]
    assert len(names) == 2 * 7 * 2
    assert all("lora_" in name for name in names)
    assert sum(p.numel() for p in one.parameters) == 2 * 4 * ((32 + 32) * 2 + (32 + 16) * 2 + (32 + 64) * 3)


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
def test_a_saved_adapter_comes_back(tiny_models, train_config, tmp_path, architecture):
    config = train_config(model=architecture)
    trained = make.policy(config, adapter_scale=0.3)
    trained.save_adapter(tmp_path / "adapter")
    names = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= names
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(saved) == len(trained.parameters)
    assert all("lora_" in name for name in saved), "only the adapter travels"
    back = load_policy(config.model.path, None, config.hardware, saved_adapter=tmp_path / "adapter")
    assert torch.equal(back.hidden_states(IDS), trained.hidden_states(IDS))
    assert back.parameters == []


def test_saving_an_adapter_asks_no_hub(load, tiny_models, train_config, tmp_path, monkeypatch):
    """PEFT would look the base up to learn whether its vocabulary grew, and wait for a hub that does not answer."""
    policy = load(tiny_models["llama3"], train_config().adapter)
    policy.peft.peft_config["default"].base_model_name_or_path = "somebody/model-7b"
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: pytest.fail("asked the hub"))
    policy.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


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


# Adapter


@pytest.mark.parametrize(
    ("target_modules", "words"),
    [
        (["q_proj", "lm_head"], "includes the output layer, which must stay frozen"),
        (["q_proj", "embed_tokens"], r"includes model\.embed_tokens, a layer of kind Embedding"),
        (["q_prj"], r"target_modules=\['q_prj'\]: Target modules .* not found"),
        ("q_prj", "target_modules=q_prj: Target modules q_prj not found"),
    ],
)
def test_target_modules_that_cannot_work(load, tiny_models, train_config, target_modules, words):
    with pytest.raises(ConfigError, match=words) as error:
        load(tiny_models["llama3"], replace(train_config().adapter, target_modules=target_modules))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", list(tiny.CONFIGS))
def test_all_linear_leaves_the_output_layer_out(train_config, architecture):
    policy = make.policy(train_config(model=architecture))
    adapted = {name.split(".lora_")[0].split(".")[-1] for name, _ in policy.model.named_parameters() if "lora_" in name}
    expected = (
        {"c_attn", "c_proj", "c_fc"}
        if architecture == "gpt2"
        else {*(f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down"))}
    )
    assert adapted == expected


def test_a_4_bit_base_trains(train_config):
    config = train_config("adapter=qlora", "approx=topk", "approx.k=5", "optim.lr=1e-2")
    assert (config.adapter.quantization, config.rollout.merge) == ("nf4", False)
    policy = make.policy(config)
    kinds = {type(m).__name__ for n, m in policy.model.named_modules() if n.endswith("q_proj.base_layer")}
    assert kinds == {"Linear4bit"}
    assert {p.dtype for p in policy.parameters} == {torch.float32}
    # What bitsandbytes asks before it changes the weights of a layer on some CPUs.
    layers = [m for n, m in policy.model.named_modules() if n.endswith("_proj.base_layer")]
    assert {m.support_avx512bf16_for_cpu for m in layers} == {False}
    frozen = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    before = [p.detach().clone() for p in policy.parameters]
    engine = config.rollout.load(policy)
    completions = engine.generate(make.prompts(policy), 2, config.sampling, config.approx.num_logprobs, seed=1)
    pi_NV = make.trained_log_probs(policy, completions, 1.0)
    token_N = torch.cat([c.token_ids_T for c in completions])
    mu_N = torch.cat([c.mu.logp_N for c in completions])
    torch.testing.assert_close(pi_NV.gather(-1, token_N[:, None])[:, 0], mu_N, rtol=1e-4, atol=1e-4)
    result = Learner(policy, config).update(make.samples(completions, [1.0, -1.0] * 4))
    assert result.gradient_norm > 0
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters, before, strict=True))
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])


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
    first = policy.hidden_states(IDS)
    assert torch.equal(policy.hidden_states(IDS), first)
    policy.model.eval()
    assert torch.equal(policy.hidden_states(IDS), first)


def test_dropout_of_the_adapter_stays(load, train_config, tiny_models):
    policy = load(tiny_models["gpt2"], replace(train_config().adapter, dropout=0.5))
    make.move_adapter(policy, 0.3)
    assert policy.model.training
    assert not torch.equal(policy.hidden_states(IDS), policy.hidden_states(IDS))


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
def test_the_check_bears_a_lower_precision(load, tiny_models, architecture):
    policy = load(tiny_models[architecture], dtype="bfloat16")
    assert policy.dtype == policy.head.weight_VH.dtype == torch.bfloat16


# Prompts


def test_plain_prompts_are_the_text(load, tiny_models):
    policy = load(tiny_models["llama3"])
    examples = [Example("1+2=", "3", {"level": 1}), Example("a", "b", {})]
    prompts = policy.encode(examples, Prompting("plain", None))
    characters = {c: i + 3 for i, c in enumerate(tiny.CHARACTERS)}
    assert [p.token_ids for p in prompts] == [tuple(characters[c] for c in "1+2="), (characters["a"],)]
    assert [(p.index, p.text, p.answer, p.columns) for p in prompts] == [
        (0, "1+2=", "3", {"level": 1}),
        (1, "a", "b", {}),
    ]


@pytest.mark.parametrize(
    ("system", "text"), [(None, "<user>1+2=\n<a>"), ("be brief", "<system>be brief\n<user>1+2=\n<a>")]
)
def test_chat_prompts_are_wrapped_by_the_template(load, tiny_models, system, text):
    policy = load(tiny_models["llama3"])
    (prompt,) = policy.encode([Example("1+2=", "3", {})], Prompting("chat", system))
    assert policy.decode(prompt.token_ids) == text
    assert prompt.text == "1+2="
    assert all(isinstance(i, int) for i in prompt.token_ids)


def test_a_tokenizer_without_chat_template(load, folder):
    (folder / "chat_template.jinja").unlink()
    policy = load(folder)
    with pytest.raises(ModelError, match=r"has no chat template; use prompt\.template=plain"):
        policy.encode([Example("1+2=", "3", {})], Prompting("chat", None))
    policy.encode([Example("1+2=", "3", {})], Prompting("plain", None))


def test_a_template_that_refuses_a_system_message(load, folder):
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusing + tiny.CHAT_TEMPLATE)
    policy = load(folder)
    with pytest.raises(ModelError, match="System role not supported"):
        policy.encode([Example("1+2=", "3", {})], Prompting("chat", "be brief"))


def test_a_response_that_does_not_fit_into_the_models_positions_is_refused(
    train_config: Callable[..., TrainConfig], tiny_models: dict[str, Path]
) -> None:
    config = train_config()
    policy = load_policy(str(tiny_models["gpt2"]), None, config.hardware)
    prompts = policy.encode([Example("1+1=", "2", {}), Example("12+34=", "46", {})], config.prompt)
    policy.check_length(prompts, 250)
    with pytest.raises(ConfigError, match=r"problem 1 has 6 tokens.*more than the 256 positions"):
        policy.check_length(prompts, 251)
