"""What the tests of the YAML files share: every choice, what has to be given with it, and the names of keys."""

import atexit
import dataclasses
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from helpers import composed
from omegaconf import DictConfig, OmegaConf

from dppo_cli.cli.main import as_hydra_has_it
from dppo_cli.commands import compare, doctor, evaluate, export, plan, report, resume, runs, sample
from dppo_cli.commands.schemas import (
    CompareConfig,
    DataConfig,
    DoctorConfig,
    EvalConfig,
    ExportConfig,
    PlanConfig,
    ReportConfig,
    RunsConfig,
    SampleConfig,
    TrainConfig,
)
from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import config_dir, groups
from dppo_cli.config.saved import to_yaml

MANDATORY = {
    ("environment", "function"): ["environment.path=env.py:reply"],
    ("environment", "tools"): ["environment.path=tools.py:multiply"],
    ("data", "file"): ["data.path=problems.jsonl"],
    ("data", "hub"): ["data.name=owner/name"],
    ("data", "reasoning_gym"): ["data.task=spell_backward"],
    ("filter", "band"): ["filter.high=5"],
    ("filter", "all_of"): ["+filter@filter.members.rare=veto"],
    ("data", "mixture"): ["+data@data.members.sums=arithmetic"],
    ("reward", "function"): ["reward.path=rewards.py:score"],
    ("reward", "judge"): ["reward.url=http://localhost:8000/v1", "reward.model=judge"],
    ("reward", "mixture"): ["+reward@reward.members.answer=exact"],
    ("reward", "model"): ["reward.path=owner/name"],
    ("model", "hf"): ["model.path=some/model"],
}
"""What has to be given with a choice whose YAML says ???."""
CHOICES = [(group, choice) for group, choices in groups().items() for choice in choices]
ROOTS = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "export": ExportConfig,
    "sample": SampleConfig,
    "doctor": DoctorConfig,
    "plan": PlanConfig,
    "report": ReportConfig,
    "data": DataConfig,
    "compare": CompareConfig,
    "runs": RunsConfig,
}
PREPARE = {
    "train": resume.prepare,
    "eval": evaluate.prepare,
    "export": export.prepare,
    "sample": sample.prepare,
    "doctor": doctor.prepare,
    "plan": plan.prepare,
    "report": report.prepare,
    "data": resume.prepare,
    "compare": compare.prepare,
    "runs": runs.prepare,
}


@cache
def a_run() -> str:
    """`run=FOLDER` of a run that has a config."""
    folder = Path(tempfile.mkdtemp(prefix="dppo-test-"))
    atexit.register(shutil.rmtree, folder)
    (folder / "config.yaml").write_text(to_yaml(composed("train")), encoding="utf-8")
    return f"run={folder}"


def required(command: str) -> list[str]:
    """What has to be given to a command."""
    if command == "report":
        return [a_run(), "out=report.html"]
    if command == "compare":
        return [a_run(), "other=base"]
    return [] if command in ("train", "doctor", "plan", "data", "runs") else [a_run()]


def prepared(command: str, *overrides: str) -> DictConfig:
    """What `dppo <command> <overrides>` makes of YAML, command line and run."""
    words = [as_hydra_has_it(command, word) for word in overrides]
    # `composed` is shared.
    return PREPARE[command](OmegaConf.create(OmegaConf.to_container(composed(command, *words))), overrides)


def built(command: str, *overrides: str) -> Any:
    """What `dppo <command> <overrides>` builds."""
    return build(ROOTS[command], prepared(command, *overrides))


def train_config(*overrides: str) -> TrainConfig:
    made: TrainConfig = built("train", *overrides)
    return made


def yaml_of(group: str, choice: str) -> dict[str, Any]:
    """A choice's own file, without what its `defaults` bring along."""
    return yaml.safe_load((config_dir() / group / f"{choice}.yaml").read_text(encoding="utf-8"))


def field_names(value: Any, prefix: str = "") -> set[str]:
    """Dotted names of the fields of a built config, which YAML has to set."""
    names = set()
    for field in dataclasses.fields(value):
        if field.init:
            child = getattr(value, field.name)
            if isinstance(child, dict) and any(map(dataclasses.is_dataclass, child.values())):
                for name, member in child.items():
                    names |= field_names(member, f"{prefix}{field.name}.{name}.")
                continue
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
