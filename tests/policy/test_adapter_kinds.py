"""The kinds of adapters: each samples what it trains, opens in plain PEFT and comes back; what is no start."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from helpers import composed, read_json
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.errors import ModelError
from dppo_cli.policy.adapter import CONFIG, WEIGHTS, read_settings
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.copies import merged_weight
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.training.card import card

IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22]])
KINDS = ("lora", "rslora", "dora", "qlora", "qdora")
LAYER = "model.layers.1.mlp.up_proj"
ComposeTrain = Callable[..., TrainConfig]


def moved(config: TrainConfig) -> Policy:
    """A policy whose adapter is far from its start, the magnitudes of DoRA, too."""
    policy = make.policy(config, adapter_scale=0.1)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    return policy


def logits(of: Any) -> Tensor:
    # bitsandbytes would repack 4-bit weights on some CPUs where no gradient is asked for.
    found: Tensor = of(input_ids=IDS).logits
    return found.detach()


# What is trained, and what samples


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_what_it_says(kind: str, train_config: ComposeTrain) -> None:
    config = train_config(f"adapter={kind}")
    policy = make.policy(config)
    layer: Any = policy.model.get_submodule(LAYER)
    names = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert layer.scaling["default"] == (8 / 4**0.5 if kind == "rslora" else 8 / 4)
    assert (type(layer.get_base_layer()).__name__ == "Linear4bit") is kind.startswith("q")
    assert len([n for n in names if "lora_magnitude_vector" in n]) == (14 if kind.endswith("dora") else 0)
    assert len([n for n in names if "lora_A" in n or "lora_B" in n]) == len(names) - 14 * kind.endswith("dora") == 28
    with policy.without_adapter():
        base = logits(policy.model)
    torch.testing.assert_close(logits(policy.model), base, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dora", "qdora"])
@torch.no_grad()
def test_fresh_dora_on_a_base_in_bfloat16_changes_nothing(kind: str, train_config: ComposeTrain) -> None:
    """PEFT itself would start with lengths rounded to bfloat16."""
    config = train_config(f"adapter={kind}", "hardware.dtype=bfloat16")
    policy = load_policy(config.model, config.hardware, warn=lambda _: None, adapter=config.adapter)
    policy.model.train()  # bitsandbytes would repack 4-bit weights on some CPUs.
    with policy.autocast():
        found = logits(policy.model)
        with policy.without_adapter():
            assert torch.equal(found, logits(policy.model))


SAMPLED_WITH = [
    (kind, weights)
    for kind in KINDS
    for weights in (("auto", "dequantized", "quantized") if kind.startswith("q") else ("auto", "adapter"))
]


@pytest.mark.parametrize(("kind", "weights"), SAMPLED_WITH)
def test_the_sampler_is_the_trainer_before_and_after_a_step(
    kind: str, weights: str, train_config: ComposeTrain
) -> None:
    config = train_config(f"adapter={kind}", "optim.lr=1e-2", "optim.warmup_updates=0")
    policy = make.policy(config)
    learner, prompts = make_learner(policy, config), make.prompts(policy)
    before = [p.detach().clone() for p in policy.parameters]
    with LocalRollout(weights, None, 512, 8).load(policy, make.fail) as engine:
        assert engine.weights.kind == ("merged" if weights == "auto" else weights)
        for step in range(2):
            engine.sync(step)
            completions = in_order(engine.generate(prompts, 3, config.sampling, 0, seed=step))
            mu_N, pi_NV = (
                make.reported(completions).logp_N.exp(),
                make.trained_log_probs(policy, prompts, completions, 1),
            )
            token_N = torch.cat([c.token_ids_T for c in make.flat(completions)])
            assert len(mu_N) > 50
            assert (mu_N - pi_NV.exp().gather(-1, token_N[:, None])[:, 0]).abs().mean() < 5e-7
            learner.update(make.groups(prompts, completions, [1.0, -1.0, 0.5] * 4))
    assert not any(torch.equal(p, old) for p, old in zip(policy.parameters, before, strict=True))
    with policy.without_adapter():
        base = logits(policy.model)
    assert (logits(policy.model) - base).abs().max() > 0.1


@torch.no_grad()
def test_dora_on_a_base_in_bfloat16_is_merged_in_float32(train_config: ComposeTrain) -> None:
    policy = moved(train_config("adapter=dora", "hardware.dtype=bfloat16"))
    layer: Any = policy.model.get_submodule(LAYER)
    sum_OI = layer.get_base_layer().weight.float() + layer.get_delta_weight("default")
    length_O = layer.lora_magnitude_vector["default"].weight
    merged_OI = merged_weight(layer)
    torch.testing.assert_close(merged_OI, length_O[:, None] * sum_OI / sum_OI.norm(dim=1, keepdim=True))
    assert not torch.equal(merged_OI, merged_OI.bfloat16().float())


# In a folder


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_opens_in_plain_peft(kind: str, train_config: ComposeTrain, model: Path, tmp_path: Path) -> None:
    policy = moved(train_config(f"adapter={kind}"))
    policy.save_adapter(tmp_path)
    saved = read_json(tmp_path / CONFIG)
    assert (saved["use_dora"], saved["use_rslora"]) == (kind.endswith("dora"), kind == "rslora")
    options: dict[str, Any] = {}
    if kind.startswith("q"):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(model, **options)
    loaded = PeftModel.from_pretrained(base, str(tmp_path)).train()
    torch.testing.assert_close(logits(loaded), logits(policy.model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_is_read_and_started_from(kind: str, train_config: ComposeTrain, tmp_path: Path) -> None:
    config, started = (train_config(f"adapter={kind}", *more) for more in ((), (f"adapter.path={tmp_path}",)))
    policy = moved(config)
    policy.save_adapter(tmp_path)
    expected = logits(policy.model)

    def load(adapter: Any, saved: Path | None) -> Policy:
        return load_policy(config.model, config.hardware, warn=make.fail, adapter=adapter, saved_adapter=saved, seed=9)

    read, start, fresh = load(config.adapter, tmp_path), load(started.adapter, None), load(config.adapter, None)
    assert torch.equal(logits(read.model), expected) and read.parameters == []
    assert torch.equal(logits(start.model), expected)
    assert {p.dtype for p in start.parameters} == {torch.float32} and len(start.parameters) == len(policy.parameters)
    assert (logits(fresh.model) - expected).abs().max() > 0.1
    # A run's own adapter is compared with what the run trained; where it started plays no part.
    (tmp_path / "moved").mkdir()
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert torch.equal(logits(load(started.adapter, tmp_path / "moved").model), expected)


def test_a_run_refuses_the_adapter_of_another_kind(train_config: ComposeTrain, tmp_path: Path) -> None:
    moved(train_config("adapter=dora")).save_adapter(tmp_path)
    config = train_config("adapter=rslora")
    with pytest.raises(ModelError, match="says use_rslora=None, but the run trained use_rslora=True"):
        load_policy(config.model, config.hardware, warn=make.fail, adapter=config.adapter, saved_adapter=tmp_path)


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["adapter=lora"], "LoRA"),
        (["adapter=qlora"], "QLoRA"),
        (["adapter=dora"], "DoRA"),
        (["adapter=qdora"], "QDoRA"),
        (["adapter=rslora"], "rsLoRA"),
        (["adapter=qdora", "adapter.use_rslora=true"], "rank-stabilised QDoRA"),
    ],
)
def test_the_card_names_the_kind(words: list[str], name: str) -> None:
    run: Any = OmegaConf.to_container(composed("train", *words, "adapter.path=/home/somebody/adapter"), resolve=True)
    text = card(run, None, "adapter")
    assert f"# {name} adapter for `arithmetic_1m`\n" in text and f"\nA {name} adapter for the language" in text
    assert f"- Adapter: {name}, `r=32`" in text
    assert "`path=adapter`" in text and "somebody" not in text
    assert f"with a {name} adapter, trained" in card(run, None, "merged")


# What something else has trained


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A config as plain PEFT writes it. The weights are not looked at."""
    settings = LoraConfig(r=6, lora_alpha=9, lora_dropout=0.1, target_modules=["v_proj", "q_proj"], use_rslora=True)
    settings.save_pretrained(str(tmp_path))
    save_file({}, tmp_path / WEIGHTS)
    return tmp_path


def configure(folder: Path, **values: object) -> None:
    (folder / CONFIG).write_text(json.dumps({**read_json(folder / CONFIG), **values}))


def test_what_a_config_says(foreign: Path) -> None:
    expected = {"r": 6, "alpha": 9, "dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    expected |= {"use_dora": False, "use_rslora": True}
    assert read_settings(foreign) == expected
    # As other tools and versions write it.
    auto = {"base_model_class": "LlamaForCausalLM", "parent_library": "x", "unsloth_fixed": True}
    configure(foreign, auto_mapping=auto, task_type="CAUSAL_LM", init_lora_weights="gaussian", something_new=None)
    assert read_settings(foreign) == expected
    old = {"peft_type": "LORA", "r": 6, "lora_alpha": 9, "lora_dropout": 0.1, "target_modules": ["q_proj", "v_proj"]}
    (foreign / CONFIG).write_text(json.dumps(old))
    assert read_settings(foreign) == expected | {"use_rslora": False}
    configure(foreign, target_modules=r"model\..*\.(q|v)_proj")
    assert read_settings(foreign)["target_modules"] == r"model\..*\.(q|v)_proj"


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("peft_type", "LOHA", "says peft_type=LOHA; training can go on with LORA adapters only"),
        ("task_type", "SEQ_CLS", "says task_type=SEQ_CLS; training can go on with CAUSAL_LM"),
        ("init_lora_weights", "pissa", "says init_lora_weights=pissa, which changes the base's weights"),
        ("modules_to_save", ["lm_head"], "says modules_to_save=['lm_head']; training cannot go on"),
        ("rank_pattern", {"q_proj": 2}, "says rank_pattern="),
        ("bias", "all", "says bias=all"),
        ("lora_bias", True, "says lora_bias=True"),
        ("layers_to_transform", [0], "says layers_to_transform=[0]"),
        ("something_new", True, "says something_new=True"),
        ("r", 0, "says r=0, an invalid value"),
        ("r", 4.0, "says r=4.0, an invalid value"),
        ("r", True, "says r=True, an invalid value"),
        ("r", None, "says r=None, an invalid value"),
        ("lora_alpha", float("nan"), "says lora_alpha=nan, an invalid value"),
        ("lora_alpha", "8", "says lora_alpha=8, an invalid value"),
        ("lora_dropout", 1.0, "says lora_dropout=1.0, an invalid value"),
        ("target_modules", None, "says target_modules=None, an invalid value"),
        ("target_modules", [], "says target_modules=[], an invalid value"),
        ("target_modules", ["${oc.env:HOME}"], "says target_modules=['${oc.env:HOME}'], an invalid value"),
        ("use_dora", "yes", "says use_dora=yes, an invalid value"),
    ],
)
def test_what_cannot_be_started_from(key: str, value: object, says: str, foreign: Path) -> None:
    configure(foreign, **{key: value})
    with pytest.raises(ModelError) as error:
        read_settings(foreign)
    assert str(error.value).startswith(f"{foreign / CONFIG} ") and says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("same", [True, False])
def test_an_adapter_of_another_base_warns(same: bool, train_config: ComposeTrain, model: Path, tmp_path: Path) -> None:
    """By its name: that tensors fit does not make them right."""
    config = train_config(f"adapter.path={tmp_path}")
    make.policy(train_config()).save_adapter(tmp_path)
    base = f"elsewhere/{model.name if same else 'other'}"
    configure(tmp_path, base_model_name_or_path=base)
    warned: list[str] = []
    load_policy(config.model, config.hardware, warn=warned.append, adapter=config.adapter)
    told = f"the adapter in {tmp_path} was trained on {base}, and model.path={model} may be another base"
    assert warned == ([] if same else [told])


def test_an_adapter_that_peft_itself_has_trained(train_config: ComposeTrain, model: Path, tmp_path: Path) -> None:
    """In half of the layers, with weights in bfloat16."""
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")
    torch.manual_seed(3)
    theirs: Any = get_peft_model(make.plain_policy(model, train_config()).model, settings)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2)
    theirs.save_pretrained(str(tmp_path))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    policy = make.policy(train_config("adapter.target_modules=[q_proj,v_proj]", f"adapter.path={tmp_path}"))
    assert len(policy.parameters) == len(tensors) == 8
    rounded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path))
    torch.testing.assert_close(logits(policy.model), logits(rounded), rtol=1e-5, atol=1e-5)
