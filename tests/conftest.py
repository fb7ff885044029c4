"""What all tests share: the tiny models in folders, and configs composed from the real YAML tree."""

import copy
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs kernels on the CPU, if it is asked to before Triton is imported, which the next ones do.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny
from benchmark_scripts import BENCHMARKS, SCRIPTS
from helpers import write_rewards
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import config_dir, groups

SMALL = (
    "batch.prompts_per_step=2",
    "batch.samples_per_prompt=2",
    "batch.prompts_per_update=2",
    "adapter.r=4",
    "adapter.alpha=8",
    "sampling.max_new_tokens=8",
    "steps=4",
)
"""What makes `dppo train` small enough for a tiny model; a test's own overrides come after it."""

ComposeTrain = Callable[..., TrainConfig]


def pytest_collection_finish() -> None:
    """Looking for garbage in all that is imported, too, would take a fifth of the time of many tests."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny tensors gain nothing from threads, and a machine that runs the tests has other work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_config_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the key is that signs runs: not that of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("config")
        patch.setenv("XDG_CONFIG_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folder of each architecture of tests/tiny.py. Shared by all tests: read, never written."""
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny.save(root / name, name) for name in tiny.CONFIGS}


@pytest.fixture
def model(tiny_models: dict[str, Path]) -> Path:
    """Folder of the tiny model that serves where the architecture does not matter."""
    return tiny_models["llama3"]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, apart from rewards.py."""
    monkeypatch.chdir(tmp_path)
    write_rewards(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def train_config(tiny_models: dict[str, Path]) -> ComposeTrain:
    """`train_config("approx=topk", "seed=3", model="qwen3")`: what `dppo train ...` builds, for a tiny model.

    Composing is slow, so it happens once per choice of groups; values are then set as Hydra would set them.
    """
    parser, names = OverridesParser.create(), groups()

    @cache
    def composed(chosen: tuple[str, ...]) -> DictConfig:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("train", ["model=hf", "hardware=cpu", "batch=small", *chosen])

    @cache
    def built(*overrides: str, model: str = "llama3") -> TrainConfig:
        chosen = tuple(word for word in overrides if word.split("=")[0] in names)
        node = copy.deepcopy(composed(chosen))
        values = [*SMALL, f"model.path={tiny_models[model]}", *(word for word in overrides if word not in chosen)]
        for override in parser.parse_overrides(values):
            OmegaConf.update(node, override.key_or_group, override.value())
        return build(TrainConfig, node)

    return built


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """`script("gpu")`: the module of benchmarks/gpu.py, loaded for this test."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for name in SCRIPTS:
        sys.modules.pop(name, None)
