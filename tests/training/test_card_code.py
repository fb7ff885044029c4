"""The Python of a model card: it loads what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from card_cases import config, snippet
from omegaconf import OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.policy.policy import Policy
from dppo_cli.training.card import card


def run_snippet(text: str, folder: Path, base: Path | None = None) -> Any:
    """The `model` that a card's code makes."""
    names: dict[str, Any] = {}
    code = snippet(text).replace('"FOLDER"', repr(str(folder)))
    exec(code if base is None else code.replace('"BASE"', repr(str(base))), names)
    assert names["tokenizer"]("1+2=")["input_ids"]
    return names["model"]


@torch.no_grad()
def assert_same(loaded: Any, policy: Policy) -> None:
    """Equal logits, and an adapter that has an effect."""
    ids = torch.tensor([policy.tokenizer("1+2=")["input_ids"]])
    loaded.train()  # bitsandbytes would repack 4-bit weights on some CPUs, and cannot with layers as small as these.
    torch.testing.assert_close(loaded(input_ids=ids).logits, policy.model(input_ids=ids).logits)
    with policy.without_adapter():
        assert (loaded(input_ids=ids).logits - policy.model(input_ids=ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize("overrides", [(), ("adapter=qdora", "hardware.dtype=float32")])
def test_the_code_loads_an_adapter_on_a_local_base(
    overrides: tuple[str, ...], train_config: Callable[..., TrainConfig], model: Path, tmp_path: Path
) -> None:
    policy = make.policy(train_config(*overrides), adapter_scale=0.3)
    policy.save_adapter(tmp_path)
    text = card(config("model=hf", f"model.path={model}", *overrides), None, "adapter")
    assert str(model.parent) not in text and f"`BASE` is the folder of the base model, `{model.name}`" in text
    loaded = run_snippet(text, tmp_path, model)
    assert getattr(loaded, "is_loaded_in_4bit", False) == bool(overrides)
    assert_same(loaded, policy)


def test_the_code_loads_an_adapter_on_the_embedded_base(tmp_path: Path) -> None:
    policy = make.policy(build(TrainConfig, OmegaConf.create(config("hardware=cpu"))), adapter_scale=0.3)
    policy.save_adapter(tmp_path)
    text = card(config(), None, "adapter")
    assert "part of the Python package `dppo`" in text
    assert_same(run_snippet(text, tmp_path), policy)


def test_the_code_loads_a_merged_model(train_config: Callable[..., TrainConfig], model: Path, tmp_path: Path) -> None:
    policy, other = (make.policy(train_config(), adapter_scale=0.3) for _ in range(2))
    assert other.peft is not None
    other.peft.merge_and_unload().save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    text = card(config("model=hf", f"model.path={model}"), None, "merged")
    assert "BASE" not in text
    assert_same(run_snippet(text, tmp_path), policy)
