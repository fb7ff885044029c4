"""The policy as it would be loaded, without a number in it: torch's fake tensors have shapes and types, and no memory.

Layers are those of transformers and the adapter is PEFT's, so whatever the run can load has its shapes here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from dppo_cli.config.sections import Hardware, LoRA, Model
from dppo_cli.errors import ModelError
from dppo_cli.kernels.low_rank import Restore, make_lean
from dppo_cli.policy.adapter import add_adapter
from dppo_cli.policy.loading import TEXT_TOWERS, _hub_answers, _quiet
from dppo_cli.policy.location import resolve_path, unavailable
from dppo_cli.policy.policy import Policy

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: 4 bits, a scale of 8 bits for every 64, and a scale of 32 bits for every 256 of those."""


@dataclass(frozen=True, eq=False)
class Source:
    """What is read of a model before its weights. `tokenizer` is None where there is none at hand."""

    path: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase | None
    file_bytes: int | None  # of the weights in a folder here
    file_dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Shapes:
    """The policy on fake tensors, and the size of its weights. `mode`: within it, tensors are made without memory."""

    mode: FakeTensorMode
    policy: Policy
    parameters: int  # of the base
    quantised: int  # parameters of the base that are in 4 bits
    adapted: tuple[tuple[int, int], ...]  # (parameters, base bytes) of each layer with an adapter or in 4 bits
    largest_layer: int  # parameters of the largest of these
    on_cpu: bool

    @property
    def base_bytes(self) -> float:
        return self.quantised * NF4_BYTES + (self.parameters - self.quantised) * self.policy.dtype.itemsize

    @property
    def trained(self) -> int:
        """Parameters of the adapter."""
        return sum(p.numel() for p in self.policy.parameters)

    def tensors(self) -> Iterator[Tensor]:
        """What is there before anything runs."""
        for parameter in (*self.policy.model.parameters(), *self.policy.model.buffers()):
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad

    @property
    def head_parameters(self) -> int:
        return self.policy.head.weight_VH.numel()


def read_source(model: Model) -> Source:
    """Config and tokenizer; a folder need not have weights. Raises ModelError if there is no config to be had."""
    _quiet()
    here = Path(model.path).is_dir()
    location = model.path if here else resolve_path(model)
    here = Path(location).is_dir()
    offline = here or constants.HF_HUB_OFFLINE or not hub_answers()
    of: dict[str, Any] = {"revision": model.revision, "local_files_only": offline, "trust_remote_code": False}
    if model.gguf_file is not None:
        of["gguf_file"] = model.gguf_file
    if here and model.gguf_file is None and not (Path(location) / "config.json").is_file():
        raise ModelError(f"{location} has no config.json; model.path must be a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(location, **of)
    except Exception as error:  # Broken files raise errors of many kinds.
        raise unavailable(location, model.path, "config.json", error) from error
    tokenizer = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, **of)
    except Exception:
        # Lengths of prompts are assumed then, and the plan says so.
        tokenizer = None
    text = config.get_text_config()
    stored = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    files = list(Path(location).glob("*.safetensors")) if here else []
    return Source(
        path=model.path,
        config=text if config.model_type in TEXT_TOWERS else config,
        tokenizer=tokenizer,
        file_bytes=sum(file.stat().st_size for file in files) or None,
        file_dtype=stored if isinstance(stored, torch.dtype) else torch.float32,
    )


@cache
def hub_answers() -> bool:
    """Asked once: of several models that are looked at, none is there if the first is not."""
    return _hub_answers()


def make_shapes(source: Source, adapter: LoRA, hardware: Hardware, dtype: torch.dtype, on_cpu: bool) -> Shapes:
    """As `load_policy`. Raises ModelError for a model without causal language modelling, ConfigError for an adapter."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with torch.device("meta"):
        try:
            model: Any = AutoModelForCausalLM.from_config(source.config, dtype=dtype)
        except (ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
            raise ModelError(f"no model can be made of the config.json of {source.path}: {_first(error)}") from None
        model.requires_grad_(False)
        model.eval()
        parameters = sum(p.numel() for p in model.parameters())
        quantised = _to_four_bits(model) if adapter.quantization is not None else 0
        peft = add_adapter(model, replace(adapter, quantization=None), source.path)
    if hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    if not (on_cpu and quantised):  # There layers on a quantised base stay PEFT's own.
        make_lean(model, torch.device("cpu"))
    model.train(hardware.gradient_checkpointing or adapter.dropout > 0)
    model.is_quantized = bool(quantised)
    with mode:
        _off_meta(model)
    # Fake tensors on the CPU stand for those of any device: on a GPU the same operations run, but for what attention.py
    # counts.
    tokenizer: Any = source.tokenizer
    policy = Policy(model, peft, tokenizer, source.path, torch.device("cpu"), dtype, (0,), 0)
    modules: Iterator[Any] = model.modules()
    layers = [_layer(m, dtype) for m in modules if isinstance(m, LoraLayer | FourBit)]
    adapted = tuple(found for found in layers if found is not None)
    return Shapes(mode, policy, parameters, quantised, adapted, max(n for n, _ in adapted), on_cpu)


def _layer(module: Any, dtype: torch.dtype) -> tuple[int, int] | None:
    """Of a layer that the sampler's copy makes anew: its parameters, and their bytes in the base. Each counts once."""
    base: Any = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(module, FourBit) and module.counted:
        return None
    if isinstance(base, FourBit):
        base.counted = True
    size = base.weight.numel()
    return size, round(size * NF4_BYTES) if isinstance(base, FourBit) else size * dtype.itemsize


class FourBit(nn.Linear):
    """Stands in for bitsandbytes' 4-bit layer: each pass dequantises the weight, and keeps it no longer."""

    counted = False
    restore: Restore = staticmethod(torch.empty_like)
    """See `LeanLoraLinear`."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Dequantised.apply(x.to(self.weight.dtype), self.weight, self.restore)  # type: ignore[no-untyped-call]
        out = out if self.bias is None else out + self.bias
        return out.clone()  # as PEFT does with the output of such a layer


class _Dequantised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor, restore: Restore) -> Tensor:
        ctx.weight_OI, ctx.restore = weight_OI, restore
        return torch.nn.functional.linear(x, restore(weight_OI))

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None]:
        return grad_out @ ctx.restore(ctx.weight_OI), None, None


def _to_four_bits(model: Any) -> int:
    """Turn the layers that bitsandbytes would quantise into stand-ins; the number of their parameters."""
    head = model.get_output_embeddings()
    count = 0
    for module in model.modules():
        if type(module) is nn.Linear and module is not head:
            module.__class__ = FourBit
            count += module.weight.numel()
    return count


def _off_meta(model: nn.Module) -> None:
    """Replace all tensors by fake ones that say they are on the CPU: only there do operations ask what a CPU can do."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                parameter = nn.Parameter(made[id(tensor)], requires_grad=tensor.requires_grad)
                # As the learner allocates it.
                parameter.grad = torch.empty_like(parameter) if tensor.requires_grad else None
                made[id(tensor)] = parameter
        return made[id(tensor)]

    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers, vars(module))
        for of in places:
            tensors = {name: value for name, value in of.items() if isinstance(value, Tensor)}
            of.update({name: fake(value) for name, value in tensors.items()})


def _first(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
