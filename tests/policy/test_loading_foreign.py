"""Model folders of somebody else: their code is never run, and whatever is broken in them ends in one line."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dppo_cli.errors import ModelError
from dppo_cli.policy.policy import Policy

Load = Callable[..., Policy]

CODE = """\
from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

Path({marker!r}).touch()


class Config(LlamaConfig):
    model_type = "theirs"


class Model(LlamaForCausalLM):
    config_class = Config


class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def marker(folder: Path, tmp_path: Path) -> Iterator[Path]:
    """There once the code beside the model has run."""
    path = tmp_path / "marker"
    (folder / "theirs.py").write_text(CODE.format(marker=str(path)))
    yield path
    assert not path.exists()
    assert not [name for name in sys.modules if name.startswith("transformers_modules.") and name.endswith("theirs")]


@pytest.fixture
def refused(load: Load, folder: Path) -> Callable[[str], None]:
    """One line that has these words in it."""

    def loading(says: str) -> None:
        with pytest.raises(ModelError) as error:
            load(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        assert says in str(error.value)

    return loading


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# Code


def test_code_that_the_model_needs(folder: Path, marker: Path, refused: Callable[[str], None]) -> None:
    classes = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    change(folder / "config.json", model_type="theirs", auto_map=classes)
    refused(f"in {folder} cannot be loaded: ")


def test_code_that_the_tokenizer_needs(folder: Path, marker: Path, refused: Callable[[str], None]) -> None:
    change(
        folder / "tokenizer_config.json",
        tokenizer_class="Tokenizer",
        auto_map={"AutoTokenizer": [None, "theirs.Tokenizer"]},
    )
    change(folder / "config.json", model_type="theirs", auto_map={"AutoConfig": "theirs.Config"})
    refused(f"in {folder} cannot be loaded: ")


def test_code_that_the_model_can_do_without(load: Load, folder: Path, marker: Path) -> None:
    """transformers has the class itself."""
    change(
        folder / "config.json",
        auto_map={"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    )
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "theirs.Tokenizer"]})
    assert type(load(folder).model).__module__ == "transformers.models.llama.modeling_llama"


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
@pytest.mark.parametrize("name", ["owner/kernel", "owner/kernel:function", "owner/kernel@main", "paged|owner/kernel"])
def test_attention_code_of_the_hub(
    name: str, key: str, folder: Path, refused: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("asked the hub"))
    change(folder / "config.json", **{key: name})
    refused(f"asks for the attention code {name} from the hub; code that comes with a model is not run")


def test_code_in_the_chat_template_reaches_nothing(load: Load, folder: Path, tmp_path: Path) -> None:
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (folder / "chat_template.jinja").write_text(template)
    tokenizer: Any = load(folder).tokenizer
    with pytest.raises(Exception, match="unsafe"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


# Files


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_pipe_is_not_waited_for(name: str, folder: Path, refused: Callable[[str], None]) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(f"{folder / name} is not a file")


def test_a_link_to_nothing(folder: Path, refused: Callable[[str], None]) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("../blobs/gone")
    refused("model.safetensors is not a file (a pipe, or a link to nothing)")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "of",
    [
        lambda content: os.urandom(len(content)),
        lambda content: b"\x10" + bytes(7) + os.urandom(5000),
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:1000],
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content.replace(b'"F32"', b'"I99"'),
        lambda content: b"\x80\x04\x95 a pickle",
    ],
    ids=["random", "random header", "empty", "5 bytes", "1000 bytes", "cut", "longer", "length", "dtype", "pickle"],
)
def test_weights_that_are_none(of: Callable[[bytes], bytes], folder: Path, refused: Callable[[str], None]) -> None:
    (folder / "model.safetensors").write_bytes(of(weights(folder)))
    refused(f"the weights in {folder} cannot be loaded: ")


@pytest.mark.parametrize(
    "index",
    [
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"metadata": {}, "weight_map": {"lm_head.weight": "gone.safetensors"}}',
        '{"metadata": {}, "weight_map": {"lm_head.weight": "../../../../etc/passwd"}}',
        "[" * 100_000,
    ],
)
def test_an_index_of_weights_that_is_none(index: str, folder: Path, refused: Callable[[str], None]) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    refused(f"in {folder} cannot be loaded: ")


def test_a_tensor_that_is_not_a_number(load: Load, folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    found["model.norm.weight"] = torch.full_like(found["model.norm.weight"], float("nan"))
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "\n" not in str(error.value)


NO_CONFIG = ["", "{", "[]", "3", '"x"', "null", "[" * 100_000, b"\xff\xfe\x00", b"\x00" * 100]


def named(content: str | bytes) -> str:
    return repr(content)[:12]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
@pytest.mark.parametrize("content", NO_CONFIG, ids=named)
def test_json_that_is_no_config(content: str | bytes, name: str, folder: Path, refused: Callable[[str], None]) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(f"in {folder} cannot be loaded: ")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", NO_CONFIG, ids=named)
def test_json_that_is_none_in_a_file_that_need_not_be_there(
    content: str | bytes, name: str, load: Load, folder: Path
) -> None:
    """An error of ours, or the end-of-sequence tokens of what is left."""
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    found = []
    with suppress(ModelError):
        found.append(load(folder).eos_ids)
    assert found in ([], [(1,)])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_size", "x"),
        ("hidden_size", -32),
        ("hidden_size", 0),
        ("hidden_size", None),
        ("hidden_size", [32]),
        ("hidden_size", 10**9),
        ("hidden_size", 10**30),
        ("hidden_size", 48),
        ("intermediate_size", 10**9),
        ("vocab_size", 10**12),
        ("vocab_size", 95),
        ("num_hidden_layers", -1),
        ("num_hidden_layers", 1),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", "2"),
        ("num_attention_heads", 0),
        ("num_attention_heads", 5),
        ("num_key_value_heads", 0),
        ("rms_norm_eps", "x"),
        ("hidden_act", "nonsense"),
        ("hidden_act", 7),
        ("rope_parameters", 5),
        ("rope_parameters", {"rope_type": "nonsense", "rope_theta": 1.0}),
        ("model_type", 3),
        ("model_type", None),
        ("attn_implementation", "nonsense"),
        ("attn_implementation", 5),
        ("max_position_embeddings", "x"),
    ],
)
def test_values_that_no_config_has(key: str, value: object, load: Load, folder: Path) -> None:
    change(folder / "config.json", **{key: value})
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model", None),
        ("model", {"type": "nonsense"}),
        ("model", {"type": "WordLevel", "vocab": {"a": -1}, "unk_token": "a"}),
        ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}),
        ("decoder", 5),
        ("added_tokens", {"a": 1}),
        ("version", 99),
    ],
)
def test_values_that_no_tokenizer_has(key: str, value: object, folder: Path, refused: Callable[[str], None]) -> None:
    change(folder / "tokenizer.json", **{key: value})
    refused(f"the tokenizer in {folder} cannot be loaded: ")


def test_weights_that_the_model_does_not_use_are_named(load: Load, folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "value_head.weight": torch.zeros(3)}, folder / "model.safetensors", {"format": "pt"})
    warned: list[str] = []
    load(folder, warn=warned.append)
    assert warned == [f"the weights in {folder} hold 1 tensors that the model does not use, such as value_head.weight"]
