"""Loading: what a folder or a name must hold, and that nothing broken loads quietly."""

import json
import time

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from dppo_cli.config.sections import Model
from dppo_cli.errors import ModelError
from dppo_cli.policy import loading
from dppo_cli.policy.location import resolve_path


def test_a_folder_that_is_not_there(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no model folder \./nowhere \(in .*\)"):
        load("./nowhere")
    for path in (str(tmp_path / "nowhere"), "nowhere", "a/b/c", "~/model"):
        with pytest.raises(ModelError, match="no model folder"):
            resolve_path(Model(path, None, None))


def test_a_folder_without_weights(load, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no weights \(\*\.safetensors\)$"):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(ModelError, match=r"pickled \.bin weights are not read; convert them"):
        load(folder)


def test_a_folder_without_tokenizer(load, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer\.json\); copy it"):
        load(folder)


def test_a_folder_without_config(load, folder):
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_file_that_is_no_json(load, folder, name):
    (folder / name).write_text("{garbage")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_weights_that_were_cut_off(load, folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"the weights in .* cannot be loaded: .*incomplete"):
        load(folder)


def test_a_tensor_that_is_missing_is_not_drawn_at_random(load, folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 of the model's tensors, such as model\.layers\.1\.mlp\.up_proj"):
        load(folder)


def test_a_tensor_of_another_shape(load, folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folder)


def test_an_architecture_that_is_not_known(load, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nonsense"}))
    with pytest.raises(ModelError, match="nonsense"):
        load(folder)


def test_an_embedded_model_that_is_not_there():
    with pytest.raises(ModelError, match=r"there is no embedded model 'arithmetic_9m'. Choices: "):
        resolve_path(Model("embedded:arithmetic_9m", None, None))


def test_a_name_on_the_hub_is_left_as_it_is():
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert resolve_path(Model(name, None, None)) == name


@pytest.fixture
def empty_cache(tmp_path, monkeypatch) -> None:
    """Nothing downloaded before is found."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_name_on_the_hub_offline(load, empty_cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ModelError,
        match=r"found no tokenizer of somebody/model-7b.*`hf download somebody/model-7b --local-dir model-7b`",
    ) as error:
        load("somebody/model-7b")
    assert "\n" not in str(error.value)


def test_a_hub_that_does_not_answer_costs_a_moment(load, empty_cache, monkeypatch):
    """huggingface_hub would wait and try again for half a minute over each file."""

    class Silence:
        def head(self, url: str, timeout: float) -> None:
            assert timeout <= 10
            raise TimeoutError

    monkeypatch.setattr(loading, "get_session", Silence)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s to try again"))
    with pytest.raises(ModelError, match="found no tokenizer of somebody/model-7b"):
        load("somebody/model-7b")


def test_a_folder_needs_no_hub(load, folder, monkeypatch):
    monkeypatch.setattr(loading, "get_session", lambda: pytest.fail("asked the hub"))
    assert load(folder).eos_ids == (1,)
