"""LoRA adapters on a model: a fresh one, one to start from, or one read and compared with what the run says it is."""

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
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
OF_ITS_START = ("auto_mapping", "init_lora_weights", "task_type")
"""Keys that say how it came to be and is opened; in them an adapter to start from may differ from one of ours."""
HARMLESS = (True, False, None, "gaussian", "orthogonal")
"""Values of init_lora_weights that leave the base as it is. PiSSA, OLoRA, LoftQ and others change its weights."""
SETTINGS = {
    "r": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "target_modules": "target_modules",
    "use_dora": "use_dora",
    "use_rslora": "use_rslora",
}
"""Fields of `LoRA` that an adapter_config.json holds, by its keys."""
MAX_CONFIG_BYTES = 2**20


def add_adapter(model: PreTrainedModel, adapter: LoRA, location: str) -> PeftModel:
    """Put a fresh adapter on a model. Raises ConfigError for layers that cannot have one."""
    config = LoraConfig(
        r=adapter.r,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=adapter.dropout,
        target_modules=adapter.target_modules,
        use_dora=adapter.use_dora,
        use_rslora=adapter.use_rslora,
        task_type="CAUSAL_LM",
        base_model_name_or_path=location,
    )
    targets = f"adapter.target_modules={adapter.target_modules}"
    if adapter.path is not None:
        targets = f"the adapter in {adapter.path} does not fit the base: its target_modules={adapter.target_modules}"
    try:
        peft = get_peft_model(model, config)
    except (ValueError, TypeError, re.error) as error:  # PEFT takes a text as a regular expression.
        raise ConfigError(f"{targets}: {str(error).splitlines()[0]}") from None
    head = model.get_output_embeddings()
    if any(p.requires_grad for p in head.parameters()):
        raise ConfigError(f"{targets} includes the output layer, which must stay frozen; leave it out")
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer.get_base_layer(), nn.Linear | Conv1D):
            kind = type(layer.get_base_layer()).__name__
            raise ConfigError(f"{targets} includes {name}, a layer of kind {kind}; name linear ones only")
        if isinstance(layer, LoraLayer) and adapter.use_dora:
            _measure_lengths(layer)
    return peft


@torch.no_grad()
def _measure_lengths(layer: Any) -> None:
    """Start DoRA with the base's lengths in float32, in which its forward compares them.

    PEFT rounds them to the base's precision: in bfloat16 a fresh adapter would change the policy by some percent.
    """
    dora = layer.lora_magnitude_vector["default"]
    dora.weight.copy_(dora.get_weight_norm(dequantize_module_weight(layer.get_base_layer()).float(), 0.0, 1.0))


def load_adapter(peft: PeftModel, folder: Path) -> None:
    """Fill the adapter of `peft` with the weights in a folder. Reads nothing but this folder, and runs nothing in it.

    Raises ModelError unless the folder holds an adapter of the same kind, rank and layers, every number finite.
    """
    _check_config(peft, folder / CONFIG, OF_THE_FILE)
    _fill(peft, folder / WEIGHTS, "it is not this run's adapter")


def start_from(peft: PeftModel, folder: Path) -> str | None:
    """As `load_adapter`, for an adapter that something else may have trained; the name of its base, if it has one.

    Raises ModelError, too, for one that PEFT does not simply add to the base.
    """
    read_settings(folder)
    _check_config(peft, folder / CONFIG, (*OF_THE_FILE, *OF_ITS_START))
    _fill(peft, folder / WEIGHTS, "it is an adapter for another base")
    base = _read_config(folder / CONFIG).get("base_model_name_or_path")
    return base if isinstance(base, str) and base else None


def read_settings(folder: Path) -> dict[str, Any]:
    """What a folder's adapter_config.json says of an adapter to start from, by the fields of `LoRA`.

    Raises ModelError for values that cannot be, and for an adapter that has more than these fields can say.
    """
    path = folder / CONFIG
    _check_folder(folder)
    found = _read_config(path)
    kind, task, start = (found.get(key) for key in ("peft_type", "task_type", "init_lora_weights"))
    if kind != "LORA":
        raise ModelError(f"{path} says peft_type={kind}; training can go on with LORA adapters only")
    if task not in ("CAUSAL_LM", None):
        raise ModelError(f"{path} says task_type={task}; training can go on with CAUSAL_LM adapters only")
    if start not in HARMLESS:
        raise ModelError(
            f"{path} says init_lora_weights={start}, which changes the base's weights; convert it to a plain LoRA "
            "adapter with PEFT (path_initial_model_for_weight_conversion)"
        )
    usual = LoraConfig().to_dict()
    layer_kind = "fan_in_fan_out"  # Follows from the base.
    for key in found.keys() - {*SETTINGS.values(), *OF_THE_FILE, *OF_ITS_START, "peft_type", layer_kind}:
        if (_plain(found[key]) or None) != (_plain(usual.get(key)) or None):
            raise ModelError(f"{path} says {key}={str(found[key])[:60]}; training cannot go on with such an adapter")
    settings = {name: found.get(key, usual[key]) for name, key in SETTINGS.items()}
    targets = settings["target_modules"]
    names = targets if isinstance(targets, list) else [targets]
    rules = {
        "r": _is_number(settings["r"]) and isinstance(settings["r"], int) and settings["r"] >= 1,
        "alpha": _is_number(settings["alpha"]) and settings["alpha"] > 0,
        "dropout": _is_number(settings["dropout"]) and 0 <= settings["dropout"] < 1,
        # OmegaConf would read ${...} as a reference.
        "target_modules": bool(names) and all(isinstance(n, str) and n.strip() and "${" not in n for n in names),
        "use_dora": isinstance(settings["use_dora"], bool),
        "use_rslora": isinstance(settings["use_rslora"], bool),
    }
    for name, holds in rules.items():
        if not holds:
            raise ModelError(f"{path} says {SETTINGS[name]}={str(settings[name])[:60]}, an invalid value")
    # PEFT writes a set, in any order.
    return {**settings, "target_modules": sorted(targets) if isinstance(targets, list) else targets}


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelError(
            f"adapter.path={folder} is not a folder here; get an adapter of the hub with `hf download OWNER/NAME "
            "--local-dir FOLDER`"
        )
    for name in (CONFIG, WEIGHTS):
        if (folder / name).exists():
            continue
        more = "; it must be the folder of a PEFT adapter"
        if (folder / "adapter" / CONFIG).is_file():
            more = f"; use adapter.path={folder / 'adapter'}"
        elif (folder / "adapter_model.bin").is_file():
            more = " (pickled .bin weights are not read; convert them to safetensors)"
        raise ModelError(f"adapter.path={folder} has no {name}{more}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def _fill(peft: PeftModel, path: Path, otherwise: str) -> None:
    """`otherwise`: what it means that names or shapes differ."""
    expected = get_peft_model_state_dict(peft, save_embedding_layers=False)
    found = _read_weights(path)
    for what, names in (("lacks", expected.keys() - found.keys()), ("has an unknown", found.keys() - expected.keys())):
        if names:
            more = f", and {len(names) - 1} more" if len(names) > 1 else ""
            raise ModelError(f"{path} {what} {sorted(names)[0]}{more}; {otherwise}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise ModelError(f"{name} in {path} is {[*tensor.shape]}; expected {[*expected[name].shape]}; {otherwise}")
        # As the adapter will have it: what is finite in float64 need not be in float32.
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ModelError(f"{name} in {path} holds values that are not finite numbers; it is broken")
    set_peft_model_state_dict(peft, found)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("it is not a file of a sensible size")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path} cannot be read: it holds {type(found).__name__}, not keys")
    return found


def _check_config(peft: PeftModel, path: Path, skip: Collection[str]) -> None:
    found, expected, usual = _read_config(path), peft.peft_config["default"].to_dict(), LoraConfig().to_dict()
    for key in dict.fromkeys([*expected, *found]):
        # What is empty in one may not exist in another version of PEFT, where it is as if it had its usual value.
        mine, theirs = _plain(expected.get(key)) or None, _plain(found.get(key, usual.get(key))) or None
        if key not in skip and mine != theirs:
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
