"""Every key of every YAML file changes its own field of the built config, and no other."""

import re
from typing import Any

import pytest
from config_cases import ROOTS, key_names, prepared, required
from helpers import composed
from omegaconf import DictConfig, OmegaConf

from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import groups

OTHER_VALUES = {
    "sampling.temperature": "0.5",
    "success_reward": "0.25",
    "run_dir": "elsewhere",
    "resume": "auto",
    "anchor": "recompute",
    "verdict": "upper",
    "filter.statistic": "k2",
    "filter.scope": "sequence_every",
    "filter.low": "0.25",
    "filter.high": "7.5",
    "environment.path": "other.py:reply",
    "environment.role": "tool",
    "environment.stop": "[x]",
    "environment.turn_tokens": "32",
    "model.path": "some/model",
    "model.revision": "main",
    "model.gguf_file": "model.gguf",
    "adapter.target_modules": "[q_proj]",
    "adapter.quantization": "nf4",
    "adapter.path": "some/adapter",
    "hardware.dtype": "bfloat16",
    "hardware.gradient_checkpointing": "true",
    "rollout.weights": "merged",
    "rollout.dtype": "bfloat16",
    "optim.betas": "[0.8,0.99]",
    "optim.schedule": "cosine",
    "optim.bits": "8",
    "optim.on_nonfinite": "skip",
    "reward.default": "0.5",
    "batch.prompts_per_update": "8",
    "prompt.template": "chat",
    "prompt.too_long": "drop",
    "order": "solve_rate",
    "tracker": "wandb",
    "console": "quiet",
    "eval_sets": "{more: {_target_: dppo_cli.data.arithmetic.Arithmetic, train_problems: 8, eval_problems: 8, "
    "operands: [0, 9], operations: +, template: '{a}+{b}='}}",
    "problems": "7",
    "keep": "[0.2,0.8]",
    "prompt.system": "Be brief.",
    "prompt.template_kwargs": "{enable_thinking: false}",
    "sampling.stop": "[x]",
    "stop.seconds": "60",
    "stop.accuracy": "0.5",
    "data.path": "other.jsonl",
    "data.eval_path": "eval.jsonl",
    "data.prompt_column": "question",
    "data.answer_column": "solution",
    "data.answer_pattern": "'#### (.+)'",
    "data.prompt_template": "'{question} = ?'",
    "data.split": "other",
    "data.eval_split": "held",
    "data.shuffle": "3",
    "data.train_problems": "7",
    "data.on_bad_row": "drop",
    "data.name": "other/name",
    "data.config": "main",
    "data.revision": "v1",
    "data.task": "countdown",
    "data.operands": "[0,120]",
    "data.operations": "+",
    "data.template": "'{a} {operation} {b} ='",
    "data.options": "{max_word_len: 5}",
    "data.weights": "{sums: 2}",
    "reward.path": "other.py:score",
    "reward.pattern": "'-?[0-9]+'",
    "reward.weights": "[2.0]",
    "reward.members.answer.pattern": "'-?[0-9]+'",
    "reward.extract": "flexible",
    "reward.tests_column": "checks",
    "reward.task_column": "kind",
    "reward.entry_column": "problem",
    "reward.numbers_column": "numbers",
    "reward.target_column": "goal",
    "reward.revision": "v1",
    "reward.device": "cpu",
    "reward.dtype": "float32",
    "reward.url": "https://judge.example/v1",
    "reward.model": "other",
    "reward.api_key_env": "JUDGE_KEY",
    "reward.template": "'Is {completion} good?'",
    "reward.system": "Be strict.",
    "reward.verdict": "'(yes|no)'",
    "reward.extra": "{seed: 3}",
    "reward.cache": "kept",
    "run": "runs/other",
    "out": "elsewhere",
    "folder": "sweeps",
    "format": "merged",
    "dtype": "bfloat16",
    "pass_k": "[1,2]",
    "checkpoint": "best",
    "base": "dequantized",
    "card": "l4",
    "prompt_tokens": "64",
    "check": "accuracy",
    "max_shard_size": "1GB",
    "converter": "convert_hf_to_gguf.py",
    "push_to_hub": "me/mine",
    "text": "1+1=",
}
"""Another allowed value for each key that is not a number; numbers are changed by rule."""
TOGETHER = {
    "prompt.system": ["prompt.template=chat"],
    "prompt.template_kwargs": ["prompt.template=chat"],
    "stop.accuracy": ["eval.every=1"],
    "pass_k": ["samples_per_prompt=2"],
    "base": ["format=merged", "adapter.quantization=nf4"],
    "converter": ["format=gguf"],
}
"""Keys whose other value needs another key, too. The effect of `key` alone is still what is looked at."""
EXCLUDES = {"data.prompt_template": "data.prompt_column", "data.prompt_column": "data.prompt_template"}
"""Keys that cannot be set while another is."""
ONLY_ONE_VALUE = {"sampling.top_p", "sampling.top_k", "sampling.min_p"}
"""Keys that training accepts only where they do nothing: tests/cli/test_mistakes_values.py checks that it refuses the
others."""


def another_value(key: str, value: Any) -> str:
    key = re.sub(r"^data\.members\.\w+", "data", key)
    if key == "hardware.device":
        return "auto" if value == "cpu" else "cpu"
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    if isinstance(value, bool):
        return str(not value).lower()
    if isinstance(value, float):
        return str(value * 0.5 if value else 0.25)
    if isinstance(value, int):
        return str(value * 2 if value else 3)
    assert value is None and key.endswith(
        ("ratio_cap", "max_new_tokens", "_per_minute", "max_requests", "max_total_tokens")
    ), f"OTHER_VALUES should hold {key}"
    return "7"


def at(built: Any, key: str) -> Any:
    for name in key.split("."):
        built = built[name] if isinstance(built, dict) else getattr(built, name)
    return built


def build_with(command: str, node: DictConfig, *overrides: str) -> Any:
    """Build a composed config with keys changed; for plain values this is what `key=value` on a command line does."""
    return build(ROOTS[command], OmegaConf.merge(OmegaConf.to_container(node), OmegaConf.from_dotlist(list(overrides))))


def check_every_key_has_an_effect(command: str, node: DictConfig, keys: set[str]) -> None:
    """Every one of `keys` changes its own field of the built config, and no other."""
    everything, unchanged = key_names(node), build_with(command, node)
    for key in sorted(keys - set(groups())):  # A group is a key of its own where its choice has none: approx=binary.
        if key in EXCLUDES and OmegaConf.select(node, EXCLUDES[key]) is not None:
            continue
        needed = [word for word in TOGETHER.get(key, []) if word.partition("=")[0] in everything]
        base = build_with(command, node, *needed) if needed else unchanged
        changed = build_with(command, node, *needed, f"{key}={another_value(key, OmegaConf.select(node, key))}")
        differs = {name for name in everything if at(changed, name) != at(base, name)}
        assert differs == {key}


def test_every_key_of_training_changes_the_config() -> None:
    node = composed("train")
    assert len(key_names(node)) > 45
    check_every_key_has_an_effect("train", node, key_names(node) - ONLY_ONE_VALUE)


@pytest.mark.parametrize(
    "choices",
    [
        ("data=file", "data.path=problems.jsonl"),
        ("data=hub", "data.name=owner/name"),
        ("data=hub", "data.name=owner/name", "data.prompt_column=null", "data.prompt_template='{q}'"),
        ("data=reasoning_gym", "data.task=spell_backward"),
        ("data=mixture", "+data@data.members.sums=arithmetic"),
        ("reward=function", "reward.path=rewards.py:score"),
        ("environment=function", "environment.path=env.py:reply"),
        ("environment=tools", "environment.path=tools.py:multiply"),
        ("reward=numeric",),
        ("reward=gsm8k",),
        ("reward=math",),
        ("reward=format",),
        ("reward=length",),
        ("reward=code",),
        ("reward=countdown",),
        ("reward=reasoning_gym",),
        ("reward=model", "reward.path=owner/name"),
        ("reward=judge", "reward.url=http://localhost:8000/v1", "reward.model=judge"),
        ("reward=mixture", "+reward@reward.members.answer=exact", "reward.weights={answer: 1}"),
        ("approx=topk",),
        ("region=prefix_budget",),
        ("region=sequence_mean",),
        ("filter=band", "filter.high=5"),
        ("filter=opsm",),
        ("objective=gspo",),
        ("objective=ipo",),
        ("objective=drpo",),
        ("objective=minimal_mask",),
        ("objective=ppo",),
    ],
    ids=lambda choices: choices[0],
)
def test_every_key_of_a_choice_changes_the_config(choices: tuple[str, ...]) -> None:
    group = choices[0].partition("=")[0]
    node = composed("train", *choices)
    keys = {key for key in key_names(node) if key.startswith(f"{group}.")}
    assert keys
    check_every_key_has_an_effect("train", node, keys)


def test_every_key_of_evaluation_changes_the_config() -> None:
    node = prepared("eval", *required("eval"))
    check_every_key_has_an_effect("eval", node, key_names(node))


def test_every_key_of_export_changes_the_config() -> None:
    node = prepared("export", *required("export"))
    check_every_key_has_an_effect("export", node, key_names(node))


@pytest.mark.parametrize("command", ["sample", "doctor", "runs"])
def test_every_key_of_the_commands_that_look_changes_the_config(command: str) -> None:
    node = prepared(command, *required(command))
    check_every_key_has_an_effect(command, node, key_names(node))
