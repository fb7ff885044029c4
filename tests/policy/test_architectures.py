"""The architectures behind conf/model/: sampled, trained and computed by the model itself, log-probs are the same."""

from collections.abc import Callable, Sequence
from pathlib import Path

import make
import pytest
import tiny_models
import torch
from helpers import read_json, read_lines
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import Gemma3ForConditionalGeneration

from dppo_cli.cli.main import main
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.conf_tree import groups
from dppo_cli.config.sections import LoRA, Sampling
from dppo_cli.errors import ModelError
from dppo_cli.policy.choice import choose_forward
from dppo_cli.policy.forward import WholeSequences
from dppo_cli.policy.head import token_log_probs
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalRollout
from dppo_cli.types import Batch, Completion, Prompt, Sample

FAMILY_OF = {
    "hf": "gemma2",
    "deepseek_r1_distill_qwen_1_5b": "qwen2",
    "gemma3_1b": "gemma3",
    "gemma3_270m": "gemma3",
    "gemma3_4b": "gemma3_vision",
    "llama3_2_1b": "llama",
    "llama3_2_3b": "llama",
    "llama3_8b": "llama",
    "mistral_7b": "mistral",
    "olmo2_1b": "olmo2",
    "phi4_mini": "phi3",
    "qwen2_5_0_5b": "qwen2",
    "qwen2_5_1_5b": "qwen2",
    "qwen2_5_7b": "qwen2",
    "qwen3_0_6b": "qwen3",
    "qwen3_1_7b": "qwen3",
    "qwen3_4b": "qwen3",
    "qwen3_8b": "qwen3",
    "smollm2_135m": "llama",
    "smollm2_1_7b": "llama",
    "smollm2_360m": "llama",
    "smollm3_3b": "smollm3",
}
"""Each YAML of conf/model/ with the family of tests/tiny_models.py that its checkpoint belongs to."""
CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "gemma3_vision": "Gemma3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "mistral_window": "MistralForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
}
ROUNDING = dict(rtol=1e-5, atol=3e-5)
TEMPERATURE = 0.7

Load = Callable[..., Policy]

EMBEDDED = {"arithmetic_1m", "long_tail_2k"}


@pytest.fixture
def adapter(train_config: Callable[..., TrainConfig]) -> LoRA:
    return train_config().adapter


def moved(load: Load, folder: Path, adapter: LoRA) -> Policy:
    """A policy whose adapter has an effect."""
    policy = load(folder, adapter)
    make.move_adapter(policy, 0.1)
    return policy


def sample(
    policy: Policy, weights: str, prompts: Sequence[Prompt], max_new_tokens: int = 16
) -> Sequence[Sequence[Completion]]:
    how = Sampling(TEMPERATURE, 1.0, 0, 0.0, max_new_tokens, [])
    with LocalRollout(weights, None, 512, 1024).load(policy, make.fail) as engine:
        engine.sync(0)
        return in_order(engine.generate(prompts, 3, how, 0, seed=3))


def trained(
    policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], whole: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-prob of each token in the forward pass of an update, and the adapter's gradient of their sum."""
    token_ids = [prompt.token_ids for prompt in prompts]
    samples = [Sample(i, c, 1.0, c.mu) for i, row in enumerate(completions) for c in row]
    batch = Batch.pack(samples, token_ids, policy.pad_id, policy.device)
    kind = WholeSequences if whole else choose_forward(policy, 90)
    forward = kind(policy, dict(enumerate(token_ids)), budget=64)
    states_NH = forward.predicting_states(batch)
    logp_N = token_log_probs(policy.head.at(TEMPERATURE), states_NH, batch.token_N, chunk_size=64)[0]
    policy.model.zero_grad()
    logp_N.sum().backward()
    forward.backward()
    return logp_N.detach(), [p.grad.clone() for p in policy.parameters]


@torch.no_grad()
def by_the_model(
    policy: Policy, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]
) -> torch.Tensor:
    """Log-prob of each token by the logits that transformers gives, one sequence at a time, without a cache."""
    found = []
    for prompt, row in zip(prompts, completions, strict=True):
        for c in row:
            token_1N = c.token_ids_T[None]
            ids_1L = torch.cat([torch.tensor([prompt.token_ids]), token_1N], dim=-1)
            logits_NV = policy.model(ids_1L, use_cache=False).logits[0, -token_1N.shape[1] - 1 : -1]
            found.append((logits_NV / TEMPERATURE).log_softmax(-1).gather(-1, token_1N[0, :, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("weights", ["auto", "adapter"])
@pytest.mark.parametrize("family", list(tiny_models.FAMILIES))
def test_log_probs_are_those_of_training_and_of_the_model(load, folders, adapter, family, weights):
    policy = moved(load, folders[family], adapter)
    assert type(policy.model).__name__ == CLASSES[family]
    for texts in (make.MIXED, make.ALIKE):
        prompts = make.prompts(policy, texts)
        completions = sample(policy, weights, prompts)
        mu_N = make.reported(completions).logp_N
        assert len(mu_N) > 100
        torch.testing.assert_close(mu_N, by_the_model(policy, prompts, completions), **ROUNDING)
        logp_N, gradient = trained(policy, prompts, completions)
        torch.testing.assert_close(mu_N, logp_N, **ROUNDING)
        logp_N, expected = trained(policy, prompts, completions, whole=True)
        torch.testing.assert_close(mu_N, logp_N, **ROUNDING)
        # Sums over hundreds of tokens; relative to the largest entry.
        for found, right in zip(gradient, expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4 * float(right.abs().max()))


def test_tokens_that_the_tokenizer_lacks_are_sampled_like_others(load, folders, adapter):
    policy = moved(load, folders["qwen2"], adapter)
    prompts = make.prompts(policy)
    completions = sample(policy, "auto", prompts)
    size = len(policy.tokenizer)
    assert size < tiny_models.VOCABULARY
    assert any(int(c.token_ids_T.max()) >= size for c in make.flat(completions))


# What is special


def test_of_a_model_with_vision_the_text_model_is_loaded(load, folders, adapter):
    policy = load(folders["gemma3_vision"], adapter)
    names = [name for name, _ in policy.model.named_parameters()]
    assert names and not [name for name in names if "vision" in name or "projector" in name]
    whole = Gemma3ForConditionalGeneration.from_pretrained(folders["gemma3_vision"])
    ids_1L = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22]])
    torch.testing.assert_close(policy.model(ids_1L).logits, whole(ids_1L).logits, rtol=1e-5, atol=1e-5)


def test_a_merged_export_of_a_model_with_vision_is_a_text_model(load, folders, work):
    assert run(folders["gemma3_vision"], "model=gemma3_4b") == 0
    assert main(["export", "run=run", "format=merged", "out=merged"]) == 0
    assert read_json(work / "merged/config.json")["architectures"] == ["Gemma3ForCausalLM"]
    assert type(load(work / "merged").model).__name__ == "Gemma3ForCausalLM"


def test_longrope_is_sampled_up_to_where_its_frequencies_change(load, folders, adapter):
    policy = moved(load, folders["phi3"], adapter)
    prompts = make.prompts(policy)
    room = tiny_models.LONGROPE_LIMIT - max(len(p.token_ids) for p in prompts)
    completions = sample(policy, "auto", prompts, room)
    assert max(len(c.token_ids_T) for c in make.flat(completions)) == room
    mu_N = make.reported(completions).logp_N
    torch.testing.assert_close(mu_N, by_the_model(policy, prompts, completions), **ROUNDING)
    message = r"frequencies change for all tokens beyond 64 \(longrope\).*max_new_tokens=42 can have more; lower it"
    with pytest.raises(ModelError, match=message):
        sample(policy, "auto", prompts, room + 1)


# Whole runs


def run(folder: Path, *words: str) -> int:
    """One step of `dppo train`."""
    small = ("hardware=cpu", "batch=small", "adapter.r=4", "adapter.alpha=8", "sampling.max_new_tokens=4", "steps=1")
    batch = ("batch.prompts_per_step=2", "batch.samples_per_prompt=4", "batch.prompts_per_update=2")
    data = ("data.train_problems=4", "data.eval_problems=1", "reward=function", "reward.path=rewards.py:late")
    return main(["train", *words, *small, *batch, *data, f"model.path={folder}", "optim.lr=0.01", "run_dir=run"])


@pytest.mark.parametrize("choice", sorted(set(groups()["model"]) - EMBEDDED))
def test_every_model_trains(folders, work, choice):
    assert choice in FAMILY_OF, f"add conf/model/{choice}.yaml to FAMILY_OF"
    assert run(folders[FAMILY_OF[choice]], f"model={choice}") == 0
    (row,) = read_lines(work / "run/metrics.jsonl")
    # The only update of the step has the very weights that sampled.
    assert row["shift_max"] < 1e-4
    adapter = load_file(work / "run/adapter/adapter_model.safetensors")
    assert all(weight.abs().max() > 0 for weight in adapter.values())
    assert OmegaConf.load(work / "run/config.yaml").prompt.template == ("plain" if choice == "hf" else "chat")


def test_no_model_is_in_the_table_twice_or_gone():
    assert set(FAMILY_OF) == set(groups()["model"]) - EMBEDDED
