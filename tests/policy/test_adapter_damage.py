"""Adapters that are damaged, or of another kind than the run's: one line, nothing loaded, nothing written."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from disturbed import contents
from helpers import TINY_RUN, read_json
from safetensors.torch import load_file, save_file
from torch import Tensor

from dppo_cli.cli.main import main
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.errors import ModelError
from dppo_cli.policy.adapter import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, load_adapter
from dppo_cli.policy.policy import Policy

KEY = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
IN_MODEL = KEY.removeprefix("base_model.model.").replace(".weight", ".default.weight")
"""A tensor as the file names it, and as the model does."""
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def shared(train_config: Callable[..., TrainConfig]) -> Policy:
    return make.policy(train_config(), adapter_scale=0.3)


@pytest.fixture
def policy(shared: Policy) -> Iterator[Policy]:
    """A tiny llama with an adapter of rank 4."""
    before = state(shared)
    yield shared
    for name, tensor in before.items():
        shared.model.get_parameter(name).data.copy_(tensor)


@pytest.fixture(scope="module")
def saved(shared: Policy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its adapter. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    shared.save_adapter(folder)
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, which a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def state(policy: Policy) -> Tensors:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters() if "lora_" in name}


def equal(first: Tensors, second: Tensors) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def refused(policy: Policy, folder: Path) -> str:
    """The one line; the adapter in memory is as it was."""
    assert policy.peft is not None
    before = state(policy)
    with pytest.raises(ModelError) as error:
        load_adapter(policy.peft, folder)
    assert equal(state(policy), before)
    assert "\n" not in str(error.value)
    return str(error.value)


def change(folder: Path, of: Callable[[Tensors], Any]) -> None:
    """Save what `of` makes of the tensors."""
    tensors = load_file(folder / WEIGHTS)
    of(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **values: object) -> None:
    (folder / CONFIG).write_text(json.dumps({**read_json(folder / CONFIG), **values}))


def test_an_adapter_comes_back(policy: Policy, adapter: Path) -> None:
    assert policy.peft is not None
    before = state(policy)
    make.move_adapter(policy, 0.1, seed=5)
    assert not equal(state(policy), before)
    load_adapter(policy.peft, adapter)
    assert equal(state(policy), before)


def test_lower_precision_is_read_as_it_is(policy: Policy, adapter: Path) -> None:
    assert policy.peft is not None
    before = state(policy)
    change(adapter, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    load_adapter(policy.peft, adapter)
    assert equal(state(policy), {name: tensor.bfloat16().float() for name, tensor in before.items()})
    assert not equal(state(policy), before)
    assert {p.dtype for n, p in policy.model.named_parameters() if "lora_" in n} == {torch.float32}


# The weights


def bad(value: float) -> Callable[[Tensors], Any]:
    return lambda t: t[KEY].view(-1)[-1:].fill_(value)


@pytest.mark.parametrize(
    ("of", "says"),
    [
        (lambda t: t.clear(), f"{WEIGHTS} lacks base_model.model.model.layers.0.mlp.down_proj.lora_A.weight, and 27"),
        (lambda t: t.pop(KEY), f"{WEIGHTS} lacks {KEY}; it is not this run's adapter"),
        (lambda t: t.update({"x": t.pop(KEY)}), f"{WEIGHTS} lacks {KEY}"),
        (lambda t: t.update({"x": torch.zeros(1)}), f"{WEIGHTS} has an unknown x; "),
        (lambda t: t.update({KEY.replace("1.mlp", "7.mlp"): t[KEY].clone()}), f"{WEIGHTS} has an unknown base_model"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(96, 32)}), "has an unknown base_model"),
        (lambda t: t.update({KEY: torch.zeros(3, 32)}), "is [3, 32]; expected [4, 32]"),
        (lambda t: t.update({KEY: t[KEY].T.contiguous()}), "is [32, 4]; expected [4, 32]"),
        (lambda t: t.update({KEY: torch.zeros(())}), "is []; expected [4, 32]"),
        (bad(float("nan")), f"{KEY} in "),
        (bad(float("inf")), "holds values that are not finite numbers; it is broken"),
        (lambda t: t.update({KEY: torch.ones(4, 32, dtype=torch.int64)}), "holds values that are not finite numbers"),
        (lambda t: t.update({KEY: torch.ones(4, 32, dtype=torch.bool)}), "holds values that are not finite numbers"),
    ],
)
def test_tensors_that_are_not_the_runs(of: Callable[[Tensors], Any], says: str, policy: Policy, adapter: Path) -> None:
    change(adapter, of)
    assert says in refused(policy, adapter)


def test_a_number_that_is_finite_only_where_it_was_saved(policy: Policy, adapter: Path) -> None:
    change(adapter, lambda t: t.update({KEY: torch.full((4, 32), 1e300, dtype=torch.float64)}))
    refused(policy, adapter)


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fn])
def test_a_precision_that_torch_can_hardly_compute_with(dtype: torch.dtype, policy: Policy, adapter: Path) -> None:
    """Read, or refused in a line."""
    assert policy.peft is not None
    before = state(policy)
    change(adapter, lambda t: t.update({KEY: t[KEY].to(dtype)}))
    with suppress(ModelError):
        load_adapter(policy.peft, adapter)
    assert torch.equal(state(policy)[IN_MODEL], before[IN_MODEL]) or torch.equal(
        state(policy)[IN_MODEL], before[IN_MODEL].to(dtype).float()
    )


NO_FILE: dict[str, Callable[[Path], object]] = {
    "pipe": lambda path: os.mkfifo(path),
    "folder": Path.mkdir,
    "link": lambda path: path.symlink_to("nowhere"),
    "nothing": lambda path: None,
}
DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[:-100],
    "header only": lambda content: content[:1000],
    "empty": lambda content: b"",
    "text": lambda content: b"hello, world",
    "huge header": lambda content: b"\xff" * 8 + content[8:],
    "longer": lambda content: content + b"x",
}


def replace(path: Path, kind: str) -> None:
    content = path.read_bytes()
    path.unlink()
    if kind in NO_FILE:
        NO_FILE[kind](path)
    else:
        path.write_bytes(DAMAGED[kind](content))


@pytest.mark.parametrize("kind", [*NO_FILE, *DAMAGED])
def test_a_file_that_is_not_what_was_saved(kind: str, policy: Policy, adapter: Path) -> None:
    replace(adapter / WEIGHTS, kind)
    assert f"{adapter / WEIGHTS} cannot be read: " in refused(policy, adapter)


# The config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("peft_type", "IA3"),
        ("peft_type", None),
        ("r", 8),
        ("lora_alpha", 9),
        ("lora_alpha", float("nan")),
        ("lora_alpha", None),
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("fan_in_fan_out", True),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 2}),
        ("layers_to_transform", [0]),
        ("auto_mapping", {"base_model_class": "x", "parent_library": "evil"}),
        ("target_modules", ["q_proj"]),
        ("target_modules", "all-linear"),
        ("something_new", True),
        ("something_new", [0]),
    ],
)
def test_an_adapter_of_another_kind(key: str, value: object, policy: Policy, adapter: Path) -> None:
    configure(adapter, **{key: value})
    said = refused(policy, adapter)
    assert f"{adapter / CONFIG} says {key}=" in said and said.endswith("it is another adapter")


def test_what_says_nothing_about_the_weights(policy: Policy, adapter: Path) -> None:
    """Where they came from, and what another version of PEFT has, and has switched off."""
    assert policy.peft is not None
    configure(adapter, something_new=None, something_else=False, a_list=[], inference_mode=False)
    configure(adapter, base_model_name_or_path="evil/model", revision="main", peft_version="99.0")
    change(adapter, lambda t: t[KEY].fill_(0.25))
    load_adapter(policy.peft, adapter)
    assert set(state(policy)[IN_MODEL].view(-1).tolist()) == {0.25}


DEEP, LARGE = "[" * 100_000, f'{{"a": "{"x" * 2 * MAX_CONFIG_BYTES}"}}'


@pytest.mark.parametrize(
    "content",
    ["", "{", "not JSON", "[]", "null", '"LORA"', DEEP, f'{{"a": {"9" * 5000}}}', "{'r': 4}", LARGE],
    ids=lambda content: content[:8],
)
def test_a_config_that_cannot_be_read(content: str, policy: Policy, adapter: Path) -> None:
    (adapter / CONFIG).write_text(content)
    assert f"{adapter / CONFIG} cannot be read: " in refused(policy, adapter)


@pytest.mark.parametrize("kind", [*NO_FILE, "cut", "huge header"])
def test_a_config_that_is_no_text_file(kind: str, policy: Policy, adapter: Path) -> None:
    replace(adapter / CONFIG, kind)
    assert f"{adapter / CONFIG} cannot be read: " in refused(policy, adapter)


# Through the commands


@pytest.fixture(scope="module")
def made(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = [*TINY_RUN, "data.train_problems=32", f"model.path={tiny_models['llama3']}", "steps=1", "run_dir=run"]
        assert main(["train", *words]) == 0
    return folder / "run"


@pytest.mark.parametrize("words", ["eval", "export", "export format=merged"])
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: change(folder, bad(float("nan"))), "holds values that are not finite numbers"),
        (lambda folder: configure(folder, lora_alpha=16), "says lora_alpha=16, but the run trained lora_alpha=8"),
    ],
    ids=["weights", "config"],
)
def test_a_command_ends_in_one_line_and_writes_nothing(
    damage: Callable[[Path], None], says: str, words: str, made: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an adapter that somebody has changed together with the summary that names its hash."""
    shutil.copytree(made, "run")
    damage(Path("run/adapter"))
    summary = read_json(Path("run/summary.json"))
    summary["adapter_sha256"] = hashlib.sha256(Path("run/adapter", WEIGHTS).read_bytes()).hexdigest()
    Path("run/summary.json").write_text(json.dumps(summary))
    before = contents(work)
    capsys.readouterr()
    command, *rest = words.split()
    assert main([command, "run=run", "out=new/result", *rest]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("dppo: ") and says in error
    assert contents(work) == before
    assert not Path("new").exists()
