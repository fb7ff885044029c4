"""LoRA adapters on a model: a fresh one, or one read from a folder and compared with what the run says it is."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dppo_cli.config.sections import LoRA
from dppo_cli.errors import ConfigError, ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OF_THE_FILE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision")
"""Keys of adapter_config.json that say nothing about the weights."""
MAX_CONFIG_BYTES = 2**20


def add_adapter(model: PreTrainedModel, adapter: LoRA, location: str) -> PeftModel:
    """Put a fresh adapter on a model. Raises ConfigError for layers that cannot have one."""
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        task_type="CAUSAL_LM",
        base_model_name_or_path=location,
    )
    try:
        peft = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"adapter.target_modules={adapter.target_modules}: {str(error).splitlines()[0]}") from None
    head = model.get_output_embeddings()
    if any(p.requires_grad for p in head.parameters()):
        raise ConfigError("adapter.target_modules includes the output layer, which must stay frozen; leave it out")
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            kind = type(layer.get_base_layer()).__name__
            raise ConfigError(f"adapter.target_modules includes {name}, a layer of kind {kind}; name linear ones only")
    return peft


def load_adapter(peft: PeftModel, folder: Path) -> None:
    """Fill the adapter of `peft` with the weights in a folder. Reads nothing but this folder, and runs nothing in it.

    Raises ModelError unless the folder holds an adapter of the same kind, rank and layers, every number finite.
    """
    _check_config(peft, folder / CONFIG)
    expected = get_peft_model_state_dict(peft, save_embedding_layers=False)
    found = _read_weights(folder / WEIGHTS)
    for what, names in (("lacks", expected.keys() - found.keys()), ("has an unknown", found.keys() - expected.keys())):
        if names:
            raise ModelError(
                f"{folder / WEIGHTS} {what} {sorted(names)[0]}, and {len(names) - 1} more; it is not this run's adapter"
            )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(f"{name} in {folder / WEIGHTS} is {[*tensor.shape]}; expected {[*expected[name].shape]}")
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ModelError(f"{name} in {folder / WEIGHTS} holds values that are not finite numbers; it is broken")
    set_peft_model_state_dict(peft, found)


def _check_config(peft: PeftModel, path: Path) -> None:
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is not a file of a sensible size")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} cannot be read: it holds {type(found).__name__}, not keys")
    expected = peft.peft_config["default"].to_dict()
    for key in dict.fromkeys([*expected, *found]):
        # What is empty in one may not exist in another version of PEFT.
        mine, theirs = _plain(expected.get(key)) or None, _plain(found.get(key)) or None
        if key not in OF_THE_FILE and mine != theirs:
            raise ModelError(f"{path} says {key}={theirs}, but the run trained {key}={mine}; it is another adapter")


def _plain(value: Any) -> Any:
    """As JSON holds it; sets have no order."""
    if isinstance(value, list | set | tuple):
        return sorted(map(str, value))
    return getattr(value, "value", value)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        if not path.is_file():  # A pipe would never end.
            raise OSError("there is no such file")
        return load_file(path)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
