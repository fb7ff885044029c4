"""A merged model as a GGUF file, by llama.cpp's own convert_hf_to_gguf.py, which the user has and names.

No maintained package on PyPI installs the converter: `gguf` only reads and writes the container, llama-cpp-python has
the script in its source archive alone, and copies under other names lag behind. Tensor layouts and tokenizers are
llama.cpp's business and change with it, so its script is run as it is, and what it wrote is read back and compared.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dppo_cli.errors import ConfigError, ModelError
from dppo_cli.policy.gguf import is_read, read_tokens
from dppo_cli.policy.policy import Policy

SCRIPT = "convert_hf_to_gguf.py"
OUTTYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8_0": "q8_0"}
"""The converter's names for our dtypes."""
READ_BACK = ("default", "llama3")
"""Kinds of rotary frequencies that transformers, with our help, reads from GGUF."""


def find_converter(named: str | None) -> Path:
    """The converter in `named`, a file or a folder of llama.cpp, or on the PATH. Raises ConfigError without one."""
    if named is None:
        found = shutil.which(SCRIPT)
        if found is not None:
            return Path(found)
        raise ConfigError(
            f"format=gguf needs llama.cpp's {SCRIPT}; run `git clone --depth 1 https://github.com/ggml-org/llama.cpp`, "
            "then add converter=llama.cpp"
        )
    path = Path(named, SCRIPT) if Path(named).is_dir() else Path(named)
    if not path.is_file() or path.suffix != ".py":
        raise ConfigError(f"converter={named} is not {SCRIPT}, nor a folder of llama.cpp that has it")
    return path


def check_converts(policy: Policy, converter: Path) -> None:
    """Raise ModelError, before the model is merged, if it could not be converted, or not be read back to compare it."""
    config = policy.model.config
    kind = config.model_type.removesuffix("_text")
    if not is_read(kind):
        raise ModelError(
            f"a GGUF file of a {kind} model cannot be read back by transformers and compared; use format=merged, and "
            f"llama.cpp's {SCRIPT} on what it writes"
        )
    scaling = {str(value) for name, value in _leaves(config.rope_parameters) if name == "rope_type"}
    if not scaling <= set(READ_BACK):
        raise ModelError(
            f"the rotary frequencies of {policy.path} are scaled ({', '.join(sorted(scaling))}), which transformers "
            f"does not read back from GGUF; use format=merged, and llama.cpp's {SCRIPT} on what it writes"
        )
    with tempfile.TemporaryDirectory() as folder:
        # As a saved model's config has it; that of a model from a GGUF file names none.
        named = deepcopy(config)
        named.architectures = [type(policy.model).__name__]
        named.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
        convert(converter, Path(folder), Path(folder, "vocabulary.gguf"), policy.tokenizer, ["--vocab-only"])


def convert(
    converter: Path, folder: Path, out: Path, tokenizer: PreTrainedTokenizerBase, options: Sequence[str]
) -> None:
    """Run the converter on a model folder. Raises ModelError with its own reason if it fails."""
    path, ids = folder / "tokenizer_config.json", list(tokenizer("a")["input_ids"])
    # The converter loads tokenizers with their own code; there is none in the folder, and none is to be fetched. Where
    # nothing is said of the first token, llama.cpp decides by the kind of tokenizer.
    plain = {key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != "auto_map"}
    plain |= {
        "add_bos_token": ids[:1] == [tokenizer.bos_token_id],
        "add_eos_token": ids[-1:] == [tokenizer.eos_token_id],
    }
    path.write_text(json.dumps(plain, indent=2), encoding="utf-8")
    command = [sys.executable, str(converter), str(folder), "--outfile", str(out), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    if done.returncode == 0 and out.is_file():
        return
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit status {done.returncode}"
    if "ModuleNotFoundError: No module named" in reason:
        package = reason.split("'")[1].split(".")[0]
        raise ModelError(f"{converter} needs the package {package}: pip install {package}")
    if any("BPE pre-tokenizer was not recognized" in line for line in lines):
        reason = (
            "it does not know this tokenizer (its pre-tokenizer), so llama.cpp could not tokenise as this model does"
        )
    raise ModelError(f"{converter} cannot convert this model: {reason.removeprefix('ERROR:hf-to-gguf:')}")


def round_to_q8_0(model: PreTrainedModel) -> None:
    """Round matrices as the converter does: each 32 weights of a row to whole multiples of 1/127 of their largest."""
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType.Q8_0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            rows = parameter.data.T if isinstance(module, Conv1D) else parameter.data
            if rows.ndim == 2 and rows.shape[1] % 32 == 0:
                plain = rows.contiguous().cpu().numpy()
                rows.copy_(torch.from_numpy(quants.dequantize(quants.quantize(plain, kind), kind)))
            elif rows.ndim == 2:
                rows.copy_(rows.half())


def check_tokenizer(file: Path, read: PreTrainedTokenizerBase, policy: Policy, texts: Sequence[str]) -> int:
    """How many of these texts the file's tokenizer, as transformers reads it, splits otherwise than the policy's.

    Raises ModelError if a token of theirs, or an end of sequence, is another one in the file.
    """
    expected = [list(policy.tokenizer(text)["input_ids"]) for text in texts]
    tokens = read_tokens(file)
    for token_id in sorted({*policy.eos_ids, *(i for ids in expected for i in ids)}):
        token = policy.tokenizer.convert_ids_to_tokens(token_id)
        if token_id >= len(tokens) or tokens[token_id] != token:
            found = tokens[token_id] if token_id < len(tokens) else None
            raise ModelError(f"token {token_id} is {token!r}, but the GGUF file has {found!r}; nothing was written")
    return sum(list(read(text)["input_ids"]) != ids for text, ids in zip(texts, expected, strict=True))


def _leaves(node: object) -> list[tuple[str, object]]:
    """The keys and values of nested mappings: Gemma has rotary frequencies by kind of layer."""
    if not isinstance(node, dict):
        return []
    return [pair for key, value in node.items() for pair in (_leaves(value) or [(str(key), value)])]
