"""From config to `Policy`: find the weights, load them in the right precision, put the adapter on."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, get_session
from tokenizers.models import BPE
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from dppo_cli.config.sections import Hardware, LoRA, Model
from dppo_cli.errors import ConfigError, ModelError
from dppo_cli.kernels.devices import CUDA, MPS, set_up
from dppo_cli.kernels.fuse import fuse
from dppo_cli.kernels.low_rank import make_lean
from dppo_cli.kernels.products import emulates_bfloat16
from dppo_cli.policy.adapter import add_adapter, load_adapter, start_from
from dppo_cli.policy.choice import warn_of_padding
from dppo_cli.policy.forward import hidden_states
from dppo_cli.policy.gguf import GGUFFile, find_gguf
from dppo_cli.policy.location import resolve_path, unavailable
from dppo_cli.policy.policy import Policy

NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
HUB_PATIENCE = 5.0
"""Seconds to wait for the hub's first answer before going on with the local cache alone."""
TEXT_TOWERS = {"gemma3": {r"^(model\.)?language_model\.(model\.)?": "model."}}
"""Models with a vision tower of which the text model alone is loaded: what becomes of the names of its weights."""


def load_policy(
    source: Model,
    hardware: Hardware,
    *,
    warn: Callable[[str], None],
    adapter: LoRA | None = None,
    saved_adapter: Path | None = None,
    seed: int = 0,
) -> Policy:
    """A plain model, or one with an adapter: one to train, or a saved one to read.

    The one to train starts from `adapter.path`, or with weights drawn from `seed`. `adapter` also says whether the base
    is quantised, and what the saved one has to be. `warn` is told what works but is unusual. Code that comes with a
    model is never run. Raises ModelError for missing or unusable weights and tokenizers, ConfigError for a device that
    is not there and for 4 bits on top of a GGUF file.
    """
    _quiet()
    device, dtype = resolve_device(hardware)
    set_up(device)
    if emulates_bfloat16(device, dtype):
        warn(
            "hardware.dtype=bfloat16 on a processor without bfloat16 is some 300 times slower than float32; use "
            "hardware.dtype=float32"
        )
    quantization = adapter.quantization if adapter else None
    if quantization is not None and device.type == MPS:
        raise ConfigError(
            f"adapter.quantization={quantization} needs bitsandbytes, which has no kernels for hardware.device=mps; "
            "use adapter=lora, or hardware=cpu"
        )
    if source.gguf_file is not None and quantization is not None:
        raise ConfigError(
            f"adapter.quantization={quantization} cannot be put on model.gguf_file={source.gguf_file}: transformers "
            "does not quantise a GGUF file again; use adapter=lora, or the model's safetensors"
        )
    path, location = source.path, resolve_path(source)
    offline = Path(location).is_dir() or not _hub_answers()
    of: dict[str, Any] = {"revision": source.revision, "local_files_only": offline, "trust_remote_code": False}
    file = None
    if source.gguf_file is not None:
        file = find_gguf(source, location, offline)
        of["gguf_file"] = source.gguf_file
        path = f"{path}/{source.gguf_file}"
    tokenizer = _load_tokenizer(location, path, of)
    model = _load_model(location, path, of, file, dtype, device, quantization, warn)
    peft = None
    if adapter is not None:
        torch.manual_seed(seed)
        peft = add_adapter(model, adapter, location)
        if saved_adapter is not None:
            load_adapter(peft, saved_adapter)
        elif adapter.path is not None:
            base = start_from(peft, Path(adapter.path))
            if base is not None and Path(base).name != Path(location).name:
                other = f"model.path={source.path} may be another base"
                warn(f"the adapter in {adapter.path} was trained on {base}, and {other}")
    if adapter is None or saved_adapter is not None:
        model.requires_grad_(False)
    if hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    make_lean(model, device)
    fuse(model, device, dtype, warn)
    if adapter is not None and saved_adapter is None:
        warn_of_padding(model, device, dtype, warn)
    _remove_base_dropout(model)
    # Train mode has two uses left: dropout on the adapter, and checkpointing, which transformers ties to it.
    dropout = 0.0 if adapter is None else adapter.dropout
    model.train(saved_adapter is None and (hardware.gradient_checkpointing or dropout > 0))
    eos_ids = _eos_ids(model, tokenizer)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    policy = Policy(model, peft, tokenizer, location, device, dtype, eos_ids, pad_id)
    check_head(policy)
    return policy


def resolve_device(hardware: Hardware) -> tuple[torch.device, torch.dtype]:
    """The device and the precision of the base's weights."""
    has_gpu = torch.cuda.is_available()
    if hardware.device == "cuda" and not has_gpu:
        raise ConfigError("hardware.device=cuda, but torch sees no GPU here; use hardware=cpu or hardware=auto")
    if hardware.device == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("hardware.device=mps, but torch sees no Apple GPU here; use hardware=cpu or hardware=auto")
    auto = "cuda" if has_gpu else "cpu"
    device = torch.device(auto if hardware.device == "auto" else hardware.device)
    if hardware.dtype == "auto":
        return device, torch.bfloat16 if device.type == "cuda" else torch.float32
    return device, getattr(torch, hardware.dtype)


def _hub_answers() -> bool:
    """One short question: without a network, huggingface_hub tries again for half a minute over each file."""
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
    except Exception:
        return False
    return True


def _load_tokenizer(location: str, path: str, of: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(location, **of)
    except Exception as error:  # Broken files raise errors of many kinds.
        raise unavailable(location, path, "tokenizer", error) from error
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if isinstance(model, BPE):
        # The library keeps words in each thread that has met them, longer than the tokenizer itself: 2 MiB for each job
        # of a sweep. Prompts are tokenised once, so looking words up again saves 0.1 ms for a prompt.
        model._resize_cache(0)
    return tokenizer


def _load_model(
    location: str,
    path: str,
    of: dict[str, Any],
    file: GGUFFile | None,
    dtype: torch.dtype,
    device: torch.device,
    quantization: str | None,
    warn: Callable[[str], None],
) -> PreTrainedModel:
    options: dict[str, Any] = {
        "dtype": dtype,
        **of,
        "use_safetensors": True,
        # By its number: weights are loaded in threads, and each has a current GPU of its own.
        "device_map": {"": torch.cuda.current_device() if device.type == CUDA else device},
        "output_loading_info": True,
    }
    if quantization == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    try:
        config = AutoConfig.from_pretrained(location, **of)
    except Exception as error:  # Broken files raise errors of many kinds.
        raise unavailable(location, path, "config.json" if file is None else "config", error) from error
    if file is not None:
        file.scale_rotary(config)
    if "/" in str(config._attn_implementation):
        raise ModelError(
            f"the config.json of {path} asks for the attention code {config._attn_implementation} from the hub; code "
            "that comes with a model is not run: remove attn_implementation from it"
        )
    text_tower = TEXT_TOWERS.get(config.model_type)
    if text_tower is not None:
        options["key_mapping"] = text_tower
        config = config.get_text_config()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(location, config=config, **options)
    except Exception as error:  # The same, and too little memory.
        raise unavailable(location, path, "weights", error) from error
    model, report = loaded
    if text_tower is not None:
        model._weight_conversions = None  # else transformers would save it under the names of the whole model
    if quantization is not None:
        keep_layout(model)
    if report["missing_keys"]:
        # transformers would draw them at random and go on.
        missing = sorted(report["missing_keys"])
        raise ModelError(f"the weights in {path} lack {len(missing)} of the model's tensors, such as {missing[0]}")
    if file is not None:
        file.check_complete(model)
    unused = sorted(report["unexpected_keys"])
    if unused:
        _check_layers(model, unused, path)
        if text_tower is None:
            warn(f"the weights in {path} hold {len(unused)} tensors that the model does not use, such as {unused[0]}")
    return model  # type: ignore[no-any-return]


def _check_layers(model: PreTrainedModel, unused: Sequence[str], path: str) -> None:
    """Raise ModelError if weights that the model does not use are those of further layers."""
    kinds = {NUMBER.sub("N", name) for name in model.state_dict()}
    layers = [name for name in unused if NUMBER.sub("N", name) in kinds]
    if layers or not any("N" in kind.split(".") for kind in kinds):
        raise ModelError(
            f"the weights in {path} have more layers than its config.json says: {len(unused)} tensors, such as "
            f"{(layers or unused)[0]}, would be left out"
        )


def keep_layout(model: nn.Module) -> None:
    """Stop 4-bit layers from rewriting their weights.

    On a CPU with AVX512-BF16 bitsandbytes would, at the first use without gradient, rewrite them with scales rounded to
    bfloat16: the policy that samples would no longer be the one that was loaded.
    """
    layers: Iterator[Any] = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _remove_base_dropout(model: PreTrainedModel) -> None:
    """Dropout inside the frozen base (GPT-2 has some) would only make pi differ from the policy that samples."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0
        # Rates that are handed to a function: attention_dropout everywhere, dropout and layerdrop in OPT.
        for key, value in list(vars(module).items()):
            if "drop" in key and isinstance(value, float):
                setattr(module, key, 0.0)


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    found: list[int] = []
    for eos in (model.generation_config.eos_token_id if model.generation_config else None, tokenizer.eos_token_id):
        found.extend([eos] if isinstance(eos, int) else eos or [])
    if not found:
        raise ModelError("neither the model's generation config nor its tokenizer names an end-of-sequence token")
    return tuple(dict.fromkeys(found))


def _quiet() -> None:
    """Keep library chatter out of the live display; errors still come through."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    for library in ("transformers", "peft", "bitsandbytes"):
        warnings.filterwarnings("ignore", module=rf"{library}\.")


@torch.no_grad()
def check_head(policy: Policy) -> None:
    """Raise ModelError unless the final hidden states and `head` give the log-probs that the model itself gives."""
    ids_1L = torch.arange(min(8, policy.head.weight_VH.shape[0]), device=policy.device)[None]
    with policy.autocast():
        expected = policy.model(input_ids=ids_1L, use_cache=False).logits.float().log_softmax(-1)
    found = policy.head.log_probs(hidden_states(policy, ids_1L))
    tolerance = 1e-4 if policy.dtype == torch.float32 else 5e-2
    if not torch.allclose(expected, found, rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"{type(policy.model).__name__} changes its logits in a way this version cannot reproduce (log-probs "
            f"differ by {float((expected - found).abs().max()):.2g}); training on them would be wrong"
        )
