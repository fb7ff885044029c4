"""Every YAML file: it composes, builds, explains itself, holds what its dataclass declares, and has an effect."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers import composed
from omegaconf import DictConfig, OmegaConf

from dppo_cli.algorithm.advantage import GroupMean
from dppo_cli.algorithm.aggregation import TokenMean
from dppo_cli.algorithm.approx import Binary, TopK
from dppo_cli.algorithm.divergence import TotalVariation
from dppo_cli.algorithm.objective import DPPO
from dppo_cli.conf_tree import config_dir, dotted_keys, groups, groups_of, known_keys
from dppo_cli.config import EvalConfig, ExportConfig, TrainConfig, build
from dppo_cli.sections import AdamW, BatchPlan, LoRA, Sampling

MANDATORY = {
    ("data", "file"): ["data.path=problems.jsonl"],
    ("reward", "function"): ["reward.path=rewards.py:score"],
    ("model", "hf"): ["model.path=some/model"],
}
"""What has to be given with a choice whose YAML says ???."""
CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices]
CONFIG_FILES = sorted(p for p in config_dir().rglob("*.yaml"))
ROOTS = {"train": TrainConfig, "eval": EvalConfig, "export": ExportConfig}
REQUIRED = {"train": [], "eval": ["run=runs/last"], "export": []}
HOLDS_HYDRA = "hydra_settings.yaml"


def name_of(path: Path) -> str:
    return str(path.relative_to(config_dir()))


def train_config(*overrides: str) -> TrainConfig:
    return build(TrainConfig, composed("train", *overrides))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_builds(group: str, choice: str) -> None:
    config = train_config(f"{group}={choice}", *MANDATORY.get((group, choice), []))
    node = yaml.safe_load((config_dir() / group / f"{choice}.yaml").read_text(encoding="utf-8"))
    target = node.get(group, node).get("_target_")
    if target:
        assert f"{type(getattr(config, group)).__module__}.{type(getattr(config, group)).__name__}" == target


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_key_of_every_choice_is_known(group: str, choice: str) -> None:
    """So that a key is never called misspelt which Hydra would find."""
    node = OmegaConf.to_container(composed("train", f"{group}={choice}", *MANDATORY.get((group, choice), [])))
    assert set(dotted_keys(node)) <= set(known_keys("train"))


def test_a_command_knows_its_own_keys_only() -> None:
    assert set(dotted_keys(OmegaConf.to_container(composed("eval", *REQUIRED["eval"])))) <= set(known_keys("eval"))
    assert "data.path" in known_keys("eval") and "divergence.delta_high" not in known_keys("eval")
    assert groups_of("eval") == ["hardware", "rollout", "data", "reward"] and groups_of("export") == []
    assert set(groups_of("train")) == set(groups())
    assert set(known_keys("export")) == set(dotted_keys(OmegaConf.to_container(composed("export"))))


@pytest.mark.parametrize("command", ROOTS)
def test_every_command_composes_and_builds(command: str) -> None:
    assert isinstance(build(ROOTS[command], composed(command, *REQUIRED[command])), ROOTS[command])


@pytest.mark.parametrize("data", groups()["data"])
@pytest.mark.parametrize("reward", groups()["reward"])
def test_every_task_of_an_evaluation_builds(data: str, reward: str) -> None:
    given = MANDATORY.get(("data", data), []) + MANDATORY.get(("reward", reward), [])
    config = build(EvalConfig, composed("eval", "model.path=m", f"data={data}", f"reward={reward}", *given))
    assert config.data is not None and config.reward is not None


@pytest.mark.parametrize("path", CONFIG_FILES, ids=name_of)
def test_every_file_begins_with_a_header(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    header = lines[1] if lines[0].startswith("# @package") else lines[0]
    assert re.match(r"# \S.{20,}", header)
    # ... and shows how it is used. (Hydra's own settings are not to be chosen.)
    if path.name != HOLDS_HYDRA:
        header_lines = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
        command = path.stem if path.parent == config_dir() else "train"
        assert any(f"dppo {command}" in line for line in header_lines)


@pytest.mark.parametrize("path", CONFIG_FILES, ids=name_of)
def test_every_key_has_a_comment_above_it(path: Path) -> None:
    """Sections are explained by their keys; `top_k` and `min_p` share the comment of `top_p`, right above them."""
    if path.name == HOLDS_HYDRA:
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    node = yaml.safe_load("\n".join(lines)) or {}
    group = path.parent.name
    sections = {key for key, value in node.items() if isinstance(value, dict)}
    bare = []
    for i, line in enumerate(lines):
        match = re.match(r"(\s*)(\w+):", line)
        if match is None or match.group(2) in {"defaults", "_target_", *sections}:
            continue
        above = lines[i - 1].strip()
        shared = match.group(2) in ("top_k", "min_p") and re.match(r"top_[pk]:", above)
        if not (above.startswith("#") or shared):
            bare.append(f"{group}/{path.stem}: {match.group(2)}")
    assert bare == []


def field_names(value: Any, prefix: str = "") -> set[str]:
    """Dotted names of the fields of a built config, which YAML has to set."""
    names = set()
    for field in dataclasses.fields(value):
        if field.init:
            child = getattr(value, field.name)
            is_section = dataclasses.is_dataclass(child)
            names |= field_names(child, f"{prefix}{field.name}.") if is_section else {prefix + field.name}
            if is_section and not dataclasses.fields(child):
                names.add(prefix + field.name)
    return names


def key_names(node: DictConfig) -> set[str]:
    """Dotted names of the keys of a composed config."""
    names = set()

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            keys = {k: v for k, v in value.items() if k != "_target_"}
            for key, child in keys.items():
                walk(f"{prefix}.{key}" if prefix else key, child)
            if not keys:
                names.add(prefix)
        else:
            names.add(prefix)

    walk("", OmegaConf.to_container(node))
    return names


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_yaml_and_dataclasses_name_the_same_keys(group: str, choice: str) -> None:
    node = composed("train", f"{group}={choice}", *MANDATORY.get((group, choice), []))
    assert key_names(node) == field_names(build(TrainConfig, node))


@pytest.mark.parametrize("command", ["eval", "export"])
def test_yaml_and_dataclasses_of_the_other_commands_name_the_same_keys(command: str) -> None:
    node = composed(command, *REQUIRED[command])
    assert key_names(node) == field_names(build(ROOTS[command], node))


def test_no_dataclass_of_the_config_has_a_default() -> None:
    """YAML is the only home of defaults."""
    seen = [LoRA, AdamW, BatchPlan, Sampling, *ROOTS.values()]
    config = train_config()
    seen += [type(getattr(config, f.name)) for f in dataclasses.fields(config) if not isinstance(f.type, type)]
    defaults = [
        f"{cls.__name__}.{f.name}"
        for cls in seen
        if dataclasses.is_dataclass(cls)
        for f in dataclasses.fields(cls)
        if f.init and (f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING)
    ]
    assert defaults == []


def test_the_papers_settings() -> None:
    """r=32, alpha=64, lr 1e-5, 128 prompts x 8 samples, 16 prompts an update, TV 0.15, K=20, cap 5, temperature 1."""
    config = train_config("model=llama3_8b", "divergence=tv", "approx=topk")
    assert config.model.path == "meta-llama/Llama-3.1-8B-Instruct"
    assert config.divergence == TotalVariation(0.15, 0.15)
    assert config.approx == TopK(20)
    assert config.objective == DPPO(ratio_cap=5.0)
    assert config.advantage == GroupMean()
    assert config.aggregation == TokenMean()
    assert config.batch == BatchPlan(128, 8, 16, 1)
    assert config.batch.updates_per_step == 8
    assert (config.adapter.r, config.adapter.alpha) == (32, 64)
    assert (config.optim.lr, config.optim.warmup_updates, config.optim.schedule) == (1e-5, 0, "constant")
    sampling = config.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1.0, 1.0, 0, 0.0)
    assert (config.anchor, config.kl_to_reference, config.prompt.template) == ("rollout", 0.0, "chat")
    assert config.warnings == []


def test_the_papers_threshold_of_kl() -> None:
    divergence = train_config("divergence=kl").divergence
    assert (divergence.delta_low, divergence.delta_high) == (0.05, 0.05)


def test_the_embedded_default() -> None:
    config = train_config()
    assert config.model.path == "embedded:arithmetic_1m"
    assert config.divergence == TotalVariation(0.15, 0.15)
    assert config.approx == Binary()
    assert config.sampling.max_new_tokens == 8
    # The model chooses the batch and the optimizer that suit its size.
    assert config.batch == train_config("batch=small").batch != train_config("batch=paper").batch
    assert config.optim == train_config("optim=adamw_small").optim != train_config("optim=adamw").optim


def test_the_command_line_wins_over_what_a_choice_sets() -> None:
    """A model chooses batch and optimizer that suit it, a data set the response length; the user has the last word."""
    config = train_config("batch=paper", "optim=adamw", "sampling.max_new_tokens=5", "batch.samples_per_prompt=4")
    assert config.batch == BatchPlan(128, 4, 16, 1)
    assert config.optim.lr == 1e-5
    assert config.sampling.max_new_tokens == 5


def test_choices_that_set_keys_of_other_groups() -> None:
    qlora = train_config("adapter=qlora")
    assert (qlora.adapter.quantization, qlora.rollout.merge) == ("nf4", False)
    assert qlora.adapter.r == train_config().adapter.r
    minirl = train_config("objective=minirl")
    assert minirl.anchor == "recompute"
    assert minirl.objective == train_config("objective=ppo").objective


OTHER_VALUES = {
    "sampling.temperature": "0.5",
    "success_reward": "0.25",
    "run_dir": "elsewhere",
    "anchor": "recompute",
    "model.path": "some/model",
    "model.revision": "main",
    "adapter.target_modules": "[q_proj]",
    "adapter.quantization": "nf4",
    "hardware.device": "cpu",
    "hardware.dtype": "bfloat16",
    "hardware.gradient_checkpointing": "true",
    "rollout.merge": "false",
    "rollout.dtype": "bfloat16",
    "optim.betas": "[0.8,0.99]",
    "optim.schedule": "cosine",
    "batch.prompts_per_update": "8",
    "prompt.template": "chat",
    "prompt.system": "Be brief.",
    "data.path": "other.jsonl",
    "data.eval_path": "eval.jsonl",
    "data.prompt_column": "question",
    "data.answer_column": "solution",
    "data.answer_pattern": "'#### (.+)'",
    "reward.path": "other.py:score",
    "reward.pattern": "'-?[0-9]+'",
    "run": "runs/other",
    "out": "elsewhere",
    "format": "merged",
    "dtype": "bfloat16",
    "pass_k": "[1,2]",
}
"""Another allowed value for each key that is no number; numbers are changed by rule."""
TOGETHER = {
    "prompt.system": ["prompt.template=chat"],
    "adapter.quantization": ["rollout.merge=false"],
    "pass_k": ["samples_per_prompt=2"],
}
"""Keys whose other value needs another key, too. The effect of `key` alone is still what is looked at."""
ONLY_ONE_VALUE = {"sampling.top_p", "sampling.top_k", "sampling.min_p"}
"""Keys that training accepts only where they do nothing: tests/test_mistakes.py checks that it refuses the others."""


def another_value(key: str, value: Any) -> str:
    if key in OTHER_VALUES:
        return OTHER_VALUES[key]
    if isinstance(value, float):
        return str(value * 0.5 if value else 0.25)
    if isinstance(value, int):
        return str(value * 2 if value else 3)
    assert value is None and key.endswith(("ratio_cap", "max_new_tokens")), f"OTHER_VALUES should hold {key}"
    return "7"


def at(built: Any, key: str) -> Any:
    for name in key.split("."):
        built = getattr(built, name)
    return built


def build_with(command: str, node: DictConfig, *overrides: str) -> Any:
    """Build a composed config with keys changed; for plain values this is what `key=value` on a command line does."""
    return build(ROOTS[command], OmegaConf.merge(OmegaConf.to_container(node), OmegaConf.from_dotlist(list(overrides))))


def check_every_key_has_an_effect(command: str, node: DictConfig, keys: set[str]) -> None:
    """Every one of `keys` changes its own field of the built config, and no other."""
    everything, unchanged = key_names(node), build(ROOTS[command], node)
    for key in sorted(keys - set(groups())):  # A group is a key of its own where its choice has none: approx=binary.
        needed = TOGETHER.get(key, [])
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
        ("reward=function", "reward.path=rewards.py:score"),
        ("approx=topk",),
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
    """`run` and `model.path` exclude each other, so the one is changed where the other is not set."""
    run, model = composed("eval", "run=runs/last"), composed("eval", "model.path=m", "data=arithmetic")
    check_every_key_has_an_effect("eval", run, key_names(run) - {"model.path"})
    check_every_key_has_an_effect("eval", model, {"model.path"})


def test_every_key_of_export_changes_the_config() -> None:
    node = composed("export")
    check_every_key_has_an_effect("export", node, key_names(node))
