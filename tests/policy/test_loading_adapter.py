"""The adapter: what it may touch, how it starts, what is saved of it, and that it trains on a 4-bit base."""

from dataclasses import replace

import make
import pytest
import tiny
import torch
from safetensors.torch import load_file

from dppo_cli.commands.assembly import make_learner
from dppo_cli.errors import ConfigError
from dppo_cli.policy.forward import hidden_states
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order

IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22]])


def test_a_fresh_adapter_changes_nothing_and_follows_the_seed(load, tiny_models, train_config):
    config = train_config()
    plain = load(tiny_models["llama3"])

    def adapted(seed: int) -> Policy:
        return load_policy(config.model, config.hardware, warn=make.fail, adapter=config.adapter, seed=seed)

    one, again, other = adapted(1), adapted(1), adapted(2)
    assert torch.equal(hidden_states(one, IDS), hidden_states(plain, IDS))
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
    back = load_policy(
        config.model,
        config.hardware,
        warn=make.fail,
        adapter=config.adapter,
        saved_adapter=tmp_path / "adapter",
    )
    assert torch.equal(hidden_states(back, IDS), hidden_states(trained, IDS))
    assert back.parameters == []


def test_saving_an_adapter_asks_no_hub(load, tiny_models, train_config, tmp_path, monkeypatch):
    """PEFT would look the base up to learn whether its vocabulary grew, and wait for a hub that does not answer."""
    policy = load(tiny_models["llama3"], train_config().adapter)
    policy.peft.peft_config["default"].base_model_name_or_path = "somebody/model-7b"
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *_: pytest.fail("asked the hub"))
    policy.save_adapter(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("target_modules", "words"),
    [
        (["q_proj", "lm_head"], "includes the output layer, which must stay frozen"),
        (["q_proj", "embed_tokens"], r"includes model\.embed_tokens, a layer of kind Embedding"),
        (["q_prj"], r"target_modules=\['q_prj'\]: Target modules .* not found"),
        ("q_prj", "target_modules=q_prj: Target modules q_prj not found"),
        ("(", r"target_modules=\(: missing \), unterminated subpattern at position 0"),
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
    assert config.adapter.quantization == "nf4"
    policy = make.policy(config)
    kinds = {type(m).__name__ for n, m in policy.model.named_modules() if n.endswith("q_proj.base_layer")}
    assert kinds == {"Linear4bit"}
    assert {p.dtype for p in policy.parameters} == {torch.float32}
    # What bitsandbytes asks before it changes the weights of a layer on some CPUs.
    layers = [m for n, m in policy.model.named_modules() if n.endswith("_proj.base_layer")]
    assert {m.support_avx512bf16_for_cpu for m in layers} == {False}
    frozen = {n: p.detach().clone() for n, p in policy.model.named_parameters() if not p.requires_grad}
    before = [p.detach().clone() for p in policy.parameters]
    prompts = make.prompts(policy)
    with config.rollout.load(policy, make.fail) as engine:
        engine.sync(0)
        completions = in_order(engine.generate(prompts, 2, config.sampling, config.approx.num_logprobs, seed=1))
    pi_NV = make.trained_log_probs(policy, prompts, completions, 1.0)
    token_N = torch.cat([c.token_ids_T for c in make.flat(completions)])
    mu_N = make.reported(completions).logp_N
    torch.testing.assert_close(pi_NV.gather(-1, token_N[:, None])[:, 0], mu_N, rtol=1e-4, atol=1e-4)
    result = make_learner(policy, config).update(make.groups(prompts, completions, [1.0, -1.0] * 4))
    assert result.gradient_norm > 0
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters, before, strict=True))
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, frozen[name])
