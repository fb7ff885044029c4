"""GGUF files of a tiny Llama, written with the `gguf` library; as a script it stands in for llama.cpp's converter.

    python gguf_files.py FOLDER --outfile FILE [--outtype f32|f16|q8_0] [--vocab-only]

The converter itself knows no tokenizer as small as this one; `make test-llama-cpp` runs it with another. What the
script needs loads in no time: many tests run it.
"""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<s>Be kind.<eos>{% endif %}"
    "<{{ m.role }}>{{ m.content }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROPE: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def tokenizer() -> "PreTrainedTokenizerFast":
    """Byte-level BPE with two merges, as GPT-2 has many."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *letters, "12", "Ġ1"])}
    backend = Tokenizer(BPE(vocabulary, [("1", "2"), ("Ġ", "1")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save(folder: Path, rope: str = "default", tokens: "PreTrainedTokenizerFast | None" = None) -> Path:
    """A random Llama as a Hugging Face folder; with `tokenizer()` if no other is given."""
    import tiny
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    words = tokens or tokenizer()
    ids = dict(pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=words.bos_token_id)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**tiny.GROUPED, **ids, vocab_size=len(words), rope_parameters=ROPE[rope]))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.3)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def vocabulary(folder: Path) -> list[str]:
    """The tokens by their ids."""
    ids = _read(folder, "tokenizer.json")["model"]["vocab"]
    return sorted(ids, key=ids.get)


def rotated(data: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a query or key projection: llama.cpp rotates pairs of neighbours, transformers halves of a head."""
    return data.reshape(heads, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)


def divisors(config: dict[str, Any]) -> NDArray[np.float32]:
    """What Llama 3 divides its rotary frequencies by: 1 for short waves, `factor` for long ones, else between."""
    rope, size = config["rope_parameters"], config["head_dim"]
    turns = rope["rope_theta"] ** -(np.arange(0, size, 2) / size) / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = np.clip((turns * rope["original_max_position_embeddings"] - low) / (high - low), 0, 1)
    return (1 / (smooth + (1 - smooth) / rope["factor"])).astype(np.float32)


def write(folder: Path, out: Path, outtype: str = "f32", without: str = "", **more: Any) -> Path:
    """The model of a folder as a GGUF file.

    `without`: a tensor that is left out. `more`: metadata that is written besides, by names with __ for dots.
    """
    writer = _writer(folder, out)
    for key, value in more.items():
        (writer.add_string if isinstance(value, str) else writer.add_uint16)(key.replace("__", "."), value)
    config = _read(folder, "config.json")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    for name, stored in load_file(folder / "model.safetensors").items():
        data = stored.astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            data = rotated(data, config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        kind = gguf.GGMLQuantizationType[outtype.upper() if data.ndim == 2 else "F32"]
        target = names.get_name(name, (".weight",))
        if target != without:
            writer.add_tensor(target, gguf.quantize(np.ascontiguousarray(data), kind), raw_dtype=kind)
    if config["rope_parameters"]["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", divisors(config))
    close(writer)
    return out


def close(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[sys.argv.index("--outfile") + 1])
    if "--vocab-only" in sys.argv:
        close(_writer(folder, out))
    else:
        write(folder, out, sys.argv[sys.argv.index("--outtype") + 1])


def _writer(folder: Path, out: Path) -> gguf.GGUFWriter:
    """With the config and the tokenizer, and no tensors yet."""
    config, words = _read(folder, "config.json"), vocabulary(folder)
    if config.get("architectures") != ["LlamaForCausalLM"]:
        raise ValueError("Failed to detect model architecture")
    writer = gguf.GGUFWriter(str(out), "llama")
    writer.add_name("tiny")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(words) - 2))
    writer.add_token_merges([" ".join(pair) for pair in _read(folder, "tokenizer.json")["model"]["merges"]])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(False)
    writer.add_chat_template((folder / "chat_template.jinja").read_text(encoding="utf-8"))
    return writer


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
