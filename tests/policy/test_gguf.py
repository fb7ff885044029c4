"""Models in GGUF files: what is loaded is what the file holds, and what cannot be read is refused in one line."""

import shutil
from dataclasses import replace
from pathlib import Path

import gguf_files
import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

from dppo_cli.config.sections import Model
from dppo_cli.errors import ConfigError, ModelError
from dppo_cli.policy import gguf, loading

IDS = torch.tensor([[5, 9, 30, 31, 7, 60, 61, 3, 4, 4, 22, 258, 259]])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny Llama with plain and one with scaled rotary frequencies, as Hugging Face folders. Shared, read only."""
    root = tmp_path_factory.mktemp("models")
    return {rope: gguf_files.save(root / rope, rope) for rope in gguf_files.ROPE}


@pytest.fixture
def file(folders, tmp_path) -> Path:
    """A GGUF file of the test's own, which it may damage."""
    return gguf_files.write(folders["default"], tmp_path / "tiny.gguf")


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("rope", list(gguf_files.ROPE))
def test_a_gguf_file_is_the_model_it_was_made_of(load, folders, tmp_path, rope):
    gguf_files.write(folders[rope], tmp_path / "tiny.gguf")
    policy, plain = load(tmp_path, gguf_file="tiny.gguf"), load(folders[rope])
    for name, parameter in plain.model.named_parameters():
        assert torch.equal(policy.model.get_parameter(name), parameter)
    assert torch.allclose(logits(policy.model), logits(plain.model), atol=1e-5)
    assert policy.model.config.rope_parameters["rope_type"] == rope
    for text in ("12+34=", "a 1 12", "été\n"):
        assert policy.tokenizer(text)["input_ids"] == plain.tokenizer(text)["input_ids"]
    assert policy.tokenizer.chat_template == gguf_files.CHAT_TEMPLATE
    assert (policy.eos_ids, policy.pad_id) == ((1,), 0)


def test_scaled_rotary_frequencies_make_another_model(load, folders, tmp_path):
    """So that the test above means something: without them the logits are others."""
    gguf_files.write(folders["llama3"], tmp_path / "tiny.gguf")
    policy = load(tmp_path, gguf_file="tiny.gguf")
    right = logits(policy.model)
    policy.model.model.rotary_emb.inv_freq.copy_(500000.0 ** -(torch.arange(0, 8, 2) / 8))
    assert (logits(policy.model) - right).abs().max() > 1e-3


def test_eight_bits_a_weight(load, folders, tmp_path):
    gguf_files.write(folders["default"], tmp_path / "tiny.gguf", "q8_0")
    policy, plain = load(tmp_path, gguf_file="tiny.gguf"), load(folders["default"])
    apart = (policy.model.lm_head.weight - plain.model.lm_head.weight).abs()
    # Half a step of 1/127 of the largest of 32 weights, which are drawn with standard deviation 0.3.
    assert 1e-4 < apart.max() < 1.7 / 127


def test_a_model_from_gguf_is_saved_like_any_other(load, file, train_config, tmp_path):
    policy = load(file.parent, train_config().adapter, gguf_file=file.name)
    merged = policy.peft.merge_and_unload()
    merged.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(merged))


def test_an_end_of_turn_ends_responses(load, folders, tmp_path):
    gguf_files.write(folders["default"], tmp_path / "tiny.gguf", tokenizer__ggml__eot_token_id=7)
    assert load(tmp_path, gguf_file="tiny.gguf").eos_ids == (1, 7)


# What is refused


def refused(load, folder, name, kind=ModelError, **more) -> str:
    with pytest.raises(kind) as error:
        load(folder, gguf_file=name, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_file_that_is_not_there(load, file, monkeypatch):
    assert f"there is no other.gguf in {file.parent}; there are: tiny.gguf" in refused(load, file.parent, "other.gguf")
    (file.parent / "text.txt").write_text("text")
    assert "there is no text.txt" in refused(load, file.parent, "text.txt")
    file.unlink()
    assert "and no other .gguf file; model.gguf_file must name one" in refused(load, file.parent, "other.gguf")
    monkeypatch.setattr(loading, "_hub_answers", lambda: False)
    assert "`hf download some/model a.gguf --local-dir model`, then add model.path=model" in refused(
        load, "some/model", "a.gguf"
    )


def test_a_file_on_the_hub_that_is_not_there(load, monkeypatch):
    def absent(*words, **options):
        raise OSError("404")

    monkeypatch.setattr(loading, "_hub_answers", lambda: True)
    monkeypatch.setattr(gguf, "cached_file", absent)
    monkeypatch.setattr(gguf.HfApi, "list_repo_files", lambda *words, **options: ["b.gguf", "README.md", "c.gguf"])
    assert "there is no a.gguf in some/model on the hub; there are: b.gguf, c.gguf" in refused(
        load, "some/model", "a.gguf"
    )


def test_a_path_that_is_the_file_itself(load, file):
    with pytest.raises(ModelError, match=rf"write model\.path={file.parent} model\.gguf_file=tiny\.gguf$"):
        load(file)
    with pytest.raises(ModelError, match=r"has no config\.json, but a GGUF file; add model\.gguf_file=tiny\.gguf$"):
        load(file.parent)


def test_without_the_package(load, file, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    assert "pip install 'dppo[gguf]'" in refused(load, file.parent, file.name)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda whole: whole[:-100], "is cut off: it has "),
        (lambda whole: whole[:3000], "is damaged, or no GGUF file"),
        (lambda whole: b"", "is damaged, or no GGUF file"),
        (lambda whole: b"no model at all" * 9, "is damaged, or no GGUF file of a kind that can be read: "),
        (lambda whole: whole[:4] + b"\x09" + whole[5:], "GGUF v9"),
        (lambda whole: whole[:8] + b"\xff" * 8 + whole[16:], "is damaged, or no GGUF file"),
    ],
)
def test_a_damaged_file(load, file, damage, text):
    file.write_bytes(damage(file.read_bytes()))
    assert text in refused(load, file.parent, file.name)


def test_what_transformers_does_not_read(load, folders, tmp_path):
    writer = GGUFWriter(str(tmp_path / "new.gguf"), "brandnew")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    gguf_files.close(writer)
    text = refused(load, tmp_path, "new.gguf")
    assert "holds a model of architecture brandnew, which transformers does not read from GGUF; it reads" in text
    gguf_files.write(folders["default"], tmp_path / "part.gguf", split__count=3)
    assert "is one of 3 parts" in refused(load, tmp_path, "part.gguf")
    gguf_files.write(folders["default"], tmp_path / "yarn.gguf", llama__rope__scaling__type="yarn")
    assert "scales its rotary frequencies (yarn)" in refused(load, tmp_path, "yarn.gguf")


def test_factors_of_another_kind(load, folders, tmp_path):
    """Neither Llama 3's formula nor anything that transformers reads."""
    scaled = shutil.copytree(folders["llama3"], tmp_path / "model")
    config = scaled / "config.json"
    config.write_text(config.read_text().replace('"high_freq_factor": 4.0', '"high_freq_factor": 9.0'))
    gguf_files.write(scaled, tmp_path / "tiny.gguf")
    text = refused(load, tmp_path, "tiny.gguf")
    assert "scales its rotary frequencies (rope_freqs.weight) in a way that transformers does not read" in text


def test_numbers_that_would_be_left_out(load, folders, tmp_path, monkeypatch):
    close = gguf_files.close

    def with_biases(writer):
        writer.add_tensor("blk.0.attn_q.bias", np.ones(32, dtype=np.float32))
        close(writer)

    monkeypatch.setattr(gguf_files, "close", with_biases)
    gguf_files.write(folders["default"], tmp_path / "tiny.gguf")
    text = refused(load, tmp_path, "tiny.gguf")
    assert "and the LlamaForCausalLM that transformers makes of it has" in text and "use its safetensors" in text


def test_four_bits_on_top(load, file, train_config):
    adapter = replace(train_config().adapter, quantization="nf4")
    text = refused(load, file.parent, file.name, ConfigError, adapter=adapter)
    assert "adapter.quantization=nf4 cannot be put on model.gguf_file=tiny.gguf" in text
    with pytest.raises(ConfigError, match=r"model\.gguf_file is empty"):
        Model(str(file.parent), None, " ")
