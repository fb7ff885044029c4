"""Models in GGUF files, which transformers unpacks into plain weights as it loads them.

transformers leaves out what it does not know, and says nothing: biases, factors of the rotary frequencies. So a file is
looked at before anything is loaded, its scaled frequencies are put into the config, and its numbers are counted.
"""

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from tqdm.auto import tqdm  # type: ignore[import-untyped]
from transformers import PretrainedConfig, PreTrainedModel, modeling_gguf_pytorch_utils
from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.hub import cached_file

from dppo_cli.config.sections import Model
from dppo_cli.errors import ModelError
from dppo_cli.policy.location import GGUF, use

LEGACY = modeling_gguf_pytorch_utils.GGUF_SUPPORTED_ARCHITECTURES
ARCHITECTURES = sorted({*LEGACY, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"})
"""What transformers reads from GGUF, in its own spelling."""
TOKENS = "tokenizer.ggml.tokens"
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""How all Llama 3.1 to 3.3 models scale their rotary frequencies, apart from the factor."""


@dataclass(frozen=True)
class GGUFFile:
    path: Path
    metadata: dict[str, Any]
    header: GgufHeader

    def scale_rotary(self, config: PretrainedConfig) -> None:
        """Put scaled rotary frequencies into the config of a model like Llama 3.1.

        The file holds f_i, by which frequency i is divided. Raises ModelError if they are scaled in another way.
        """
        kind = self.metadata.get(f"{self.header.architecture}.rope.scaling.type", "none")
        names = [name for name in self.header.ggml_types if name.startswith("rope_")]
        if kind == "none" and not names:
            return
        if kind == "none" and names == ["rope_freqs.weight"]:
            factors: torch.Tensor = load_gguf_state_dict(self.header)[names[0]][...].float()
            plain = {**config.rope_parameters, "rope_type": "default"}
            config.rope_parameters = {**plain, **LLAMA3, "factor": float(factors.max())}
            scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
            powers = torch.arange(len(factors), dtype=torch.float32) / len(factors)
            if torch.allclose(plain["rope_theta"] ** -powers / factors, scaled, rtol=1e-4, atol=0):
                return
        raise ModelError(
            f"{self.path} scales its rotary frequencies ({kind if kind != 'none' else names[0]}) in a way that "
            "transformers does not read from GGUF, so it would be another model; use its safetensors"
        )

    def check_complete(self, model: PreTrainedModel) -> None:
        """Raise ModelError unless the model has all of the file's numbers; add its end of turn to the model's ends."""
        held = sum(prod(t.shape) for t in self.header.tensors if not t.name.startswith("rope_"))
        used = sum(p.numel() for p in model.parameters())
        if held != used:
            raise ModelError(
                f"{self.path} holds {held:,} numbers, and the {type(model).__name__} that transformers makes of it has "
                f"{used:,}, which is another model; use its safetensors"
            )
        turn = self.metadata.get("tokenizer.ggml.eot_token_id")
        ends, of = model.config.eos_token_id, model.generation_config
        if of is not None and turn is not None:
            of.eos_token_id = list(dict.fromkeys([*(ends if isinstance(ends, list) else [ends]), turn]))


def find_gguf(model: Model, location: str, offline: bool) -> GGUFFile:
    """The file, looked at but not loaded. Raises ModelError if it is not there, is damaged, or cannot be read."""
    assert model.gguf_file is not None
    if find_spec("gguf") is None:
        raise ModelError(f"{use(model.gguf_file)} needs the package gguf: pip install 'dppo[gguf]'")
    # A bar of its own, which no setting of transformers hides.
    modeling_gguf_pytorch_utils.tqdm = partial(tqdm, disable=True)  # type: ignore[attr-defined]
    file = _located(model, model.gguf_file, location, offline)
    try:
        found = GGUFFile(file, read_gguf_metadata(str(file))[0], GgufHeader.from_file(str(file)))
    except Exception as error:  # Broken files raise errors of many kinds.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ModelError(f"{file} is damaged, or no GGUF file of a kind that can be read: {reason}") from error
    end = found.header.data_start + max((t.offset + t.nbytes for t in found.header.tensors), default=0)
    if file.stat().st_size < end:
        raise ModelError(f"{file} is cut off: it has {file.stat().st_size:,} bytes of {end:,}; get it again")
    parts = found.metadata.get("split.count", 0)
    if parts > 1:
        raise ModelError(f"{file} is one of {parts} parts; join them with llama.cpp's `llama-gguf-split --merge`")
    if not is_read(found.header.architecture):
        raise ModelError(
            f"{file} holds a model of architecture {found.header.architecture}, which transformers does not read from "
            f"GGUF; it reads {', '.join(ARCHITECTURES)}"
        )
    return found


def is_read(architecture: str) -> bool:
    """Whether transformers reads the architecture from GGUF, by its name there (qwen2moe) or here (qwen2_moe)."""
    plain = str.maketrans("", "", "_-")
    return architecture.translate(plain) in {name.translate(plain) for name in ARCHITECTURES}


def read_tokens(file: Path) -> list[str]:
    """The vocabulary of a GGUF file, as it is spelt there."""
    return list(read_gguf_metadata(str(file), (TOKENS,))[0][TOKENS])


def _located(model: Model, name: str, location: str, offline: bool) -> Path:
    if Path(location).is_dir():
        there = sorted(str(p.relative_to(location)) for p in Path(location).rglob(f"*{GGUF}") if p.is_file())
        file = Path(location, name)
        if file.is_file() and name.endswith(GGUF):
            return file
        raise ModelError(f"there is no {name} in {location}{_named(there)}")
    try:
        return Path(str(cached_file(location, name, revision=model.revision, local_files_only=offline)))
    except Exception as error:
        listed: list[str] = []
        with suppress(Exception):  # a gated model, a network that just went away
            if not offline:
                listed = HfApi().list_repo_files(location, revision=model.revision)
        there = [file for file in listed if file.endswith(GGUF)]
        if there:
            raise ModelError(f"there is no {name} in {model.path} on the hub{_named(there)}") from error
        folder = model.path.split("/")[-1]
        raise ModelError(
            f"found no {name} of {model.path}, neither in the local cache nor on the hub now; with a network, "
            f"`hf download {model.path} {name} --local-dir {folder}`, then add model.path={folder}"
        ) from error


def _named(names: list[str]) -> str:
    if not names:
        return ", and no other .gguf file; model.gguf_file must name one"
    return f"; there are: {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}"
