"""A tiny model to load, and one to damage."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import make
import pytest
import tiny_models

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.sections import LoRA, Model
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A tiny model of the test's own, which it may damage."""
    return Path(shutil.copytree(tiny_models["llama3"], tmp_path / "model"))


@pytest.fixture
def load(train_config: Callable[..., TrainConfig]) -> Callable[..., Policy]:
    """`load(path, adapter, dtype="bfloat16")`: further words change the hardware section."""
    config = train_config()

    def loaded(
        path: Path | str,
        adapter: LoRA | None = None,
        *,
        gguf_file: str | None = None,
        warn: Callable[[str], None] = make.fail,
        **hardware,
    ) -> Policy:
        model = Model(str(path), None, gguf_file)
        return load_policy(model, replace(config.hardware, **hardware), warn=warn, adapter=adapter)

    return loaded


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: tiny_models.save(root / family, family) for family in tiny_models.FAMILIES}


@pytest.fixture
def made(train_config: Callable[..., TrainConfig], folders: dict[str, Path]) -> Callable[..., Policy]:
    """`made("qwen3", "adapter=qlora")`: a policy whose adapter has an effect."""

    def policy(family: str, *words: str) -> Policy:
        config = train_config(*words)
        return make.policy(replace(config, model=replace(config.model, path=str(folders[family]))), adapter_scale=0.1)

    return policy
