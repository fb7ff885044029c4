"""Every YAML file composes, builds, explains itself and holds what its dataclass declares."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml
from config_cases import (
    CHOICES,
    MANDATORY,
    ROOTS,
    built,
    field_names,
    key_names,
    prepared,
    required,
    train_config,
    yaml_of,
)
from helpers import composed
from omegaconf import OmegaConf

from dppo_cli.cli.mistakes import FREE
from dppo_cli.config.conf_tree import config_dir, dotted_keys, groups, groups_of, known_keys
from dppo_cli.config.sections import AdamW, BatchPlan, LoRA, Sampling

CONFIG_FILES = sorted(p for p in config_dir().rglob("*.yaml"))
HOLDS_HYDRA = "hydra_settings.yaml"


def name_of(path: Path) -> str:
    return str(path.relative_to(config_dir()))


# Composing and building


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_builds(group: str, choice: str) -> None:
    config = train_config(f"{group}={choice}", *MANDATORY.get((group, choice), []))
    node = yaml_of(group, choice)
    target = node.get(group, node).get("_target_")
    if target:
        assert f"{type(getattr(config, group)).__module__}.{type(getattr(config, group)).__name__}" == target


@pytest.mark.parametrize("command", ROOTS)
def test_every_command_composes_and_builds(command: str) -> None:
    assert isinstance(built(command, *required(command)), ROOTS[command])


@pytest.mark.parametrize("data", groups()["data"])
@pytest.mark.parametrize("reward", groups()["reward"])
def test_every_task_of_an_evaluation_builds(data: str, reward: str) -> None:
    given = MANDATORY.get(("data", data), []) + MANDATORY.get(("reward", reward), [])
    config = built("eval", "model.path=m", f"data={data}", f"reward={reward}", *given)
    assert config.data is not None and config.reward is not None


# Keys


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_key_of_every_choice_is_known(group: str, choice: str) -> None:
    """So that a key is never called misspelt which Hydra would find."""
    node = OmegaConf.to_container(composed("train", f"{group}={choice}", *MANDATORY.get((group, choice), [])))
    assert {key for key in dotted_keys(node) if not key.startswith(FREE)} <= set(known_keys("train"))


def test_a_command_knows_its_own_keys_only() -> None:
    assert set(dotted_keys(OmegaConf.to_container(composed("eval")))) <= set(known_keys("eval"))
    assert "data.path" in known_keys("eval") and "divergence.delta_high" not in known_keys("eval")
    assert groups_of("eval") == ["hardware", "rollout", "data", "reward", "environment"]
    assert groups_of("export") == ["data", "reward", "environment", "hardware"]
    assert set(groups_of("train")) == set(groups())
    assert set(dotted_keys(OmegaConf.to_container(composed("export")))) <= set(known_keys("export"))
    assert "data.path" in known_keys("export") and "divergence.delta_high" not in known_keys("export")
    assert groups_of("sample") == ["environment", "hardware"] and groups_of("doctor") == ["hardware"]
    assert groups_of("plan") == groups_of("train")
    assert set(known_keys("plan")) - set(known_keys("train")) == {"json", "card", "prompt_tokens"}
    assert "sampling.top_k" in known_keys("sample") and "data.path" not in known_keys("sample")


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_yaml_and_dataclasses_name_the_same_keys(group: str, choice: str) -> None:
    words = [f"{group}={choice}", *MANDATORY.get((group, choice), [])]
    assert key_names(composed("train", *words)) == field_names(train_config(*words))


@pytest.mark.parametrize("command", [command for command in ROOTS if command != "train"])
def test_yaml_and_dataclasses_of_the_other_commands_name_the_same_keys(command: str) -> None:
    words = required(command)
    assert key_names(prepared(command, *words)) == field_names(built(command, *words))


def test_no_dataclass_of_the_config_has_a_default() -> None:
    """YAML is the only home of defaults."""
    seen = [LoRA, AdamW, BatchPlan, Sampling, *ROOTS.values()]
    config = train_config()
    seen += [type(getattr(config, f.name)) for f in dataclasses.fields(config)]
    defaults = [
        f"{cls.__name__}.{f.name}"
        for cls in seen
        if dataclasses.is_dataclass(cls)
        for f in dataclasses.fields(cls)
        if f.init and (f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING)
    ]
    assert defaults == []


# Comments


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
        match = re.match(r"\s*(\w+):", line)
        if match is None or match.group(1) in {"defaults", "_target_", *sections}:
            continue
        above = lines[i - 1].strip()
        shared = match.group(1) in ("top_k", "min_p") and re.match(r"top_[pk]:", above)
        if not (above.startswith("#") or shared):
            bare.append(f"{group}/{path.stem}: {match.group(1)}")
    assert bare == []
