"""`dppo export`: what it writes is the trained policy, and can be read without this package."""

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import make
import pytest
import torch
from exports import IDS, base_logits, difference
from helpers import read_json, train, write_rewards
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dppo_cli.cli.main import main
from dppo_cli.commands.export import PLAIN_CPU
from dppo_cli.commands.trained import read_run_config
from dppo_cli.policy.loading import load_policy
from dppo_cli.telemetry import phases

WITHOUT_DPPO = f"""\
import sys
sys.modules["dppo_cli"] = None  # Importing it fails from here on.
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, merged, out = sys.argv[1:]
ids = torch.tensor({IDS})
found = {{}}
for name in ("adapter", "merged"):
    model = AutoModelForCausalLM.from_pretrained(merged if name == "merged" else base, dtype=torch.float32)
    if name == "adapter":
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        found[name] = model(input_ids=ids).logits
torch.save(found, out)
assert AutoTokenizer.from_pretrained(merged)("1+1=")["input_ids"] == [4, 13, 4, 15]
"""
"""Opens both exports with plain PEFT and plain transformers, and writes their logits."""


@pytest.fixture(scope="module")
def trained(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose policy differs clearly from its base. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        assert train(tiny_models["llama3"], "steps=4", "optim.lr=0.02", "run_dir=run") == 0
    return folder / "run"


@torch.no_grad()
def policy_logits(run: Path) -> Tensor:
    """Of the trained policy, as our own loader reads it."""
    config = read_run_config(run)
    policy = load_policy(
        config.model,
        PLAIN_CPU,
        warn=make.fail,
        adapter=config.adapter,
        saved_adapter=run / "adapter",
    )
    return policy.model(input_ids=torch.tensor(IDS)).logits.float()


def test_peft_and_transformers_read_the_trained_policy(
    trained: Path, model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a process that cannot import this package."""
    assert main(["export", f"run={trained}", "format=adapter", "out=adapter"]) == 0
    assert difference(capsys.readouterr().out) == 0.0
    assert main(["export", f"run={trained}", "format=merged", "out=merged"]) == 0
    assert 0 <= difference(capsys.readouterr().out) < 1e-4

    command = [sys.executable, "-c", WITHOUT_DPPO, str(model), "adapter", "merged", "logits.pt"]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = torch.load(work / "logits.pt"), policy_logits(trained)
    assert torch.allclose(found["adapter"], expected, atol=1e-6)
    assert torch.allclose(found["merged"], expected, atol=2e-5)
    # The base model's logits are others, so the comparison means something.
    assert (base_logits(model) - expected).abs().max() > 0.5


def test_the_files_of_an_export(trained: Path, work: Path) -> None:
    for form in ("adapter", "merged"):
        assert main(["export", f"run={trained}", f"format={form}", f"out={form}"]) == 0
    assert {p.suffix for p in work.rglob("*") if p.is_file()} <= {".json", ".safetensors", ".jinja", ".md", ".py"}
    assert (work / "adapter/adapter_model.safetensors").is_file()
    assert not list((work / "merged").glob("adapter*"))
    assert {t.dtype for t in load_file(work / "merged/model.safetensors").values()} == {torch.float32}


def test_a_merge_is_base_plus_scaled_product(trained: Path, model: Path, work: Path) -> None:
    assert main(["export", f"run={trained}", "format=merged", "out=mine"]) == 0
    base, merged = load_file(model / "model.safetensors"), load_file(work / "mine/model.safetensors")
    adapter = load_file(trained / "adapter/adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
    assert torch.allclose(merged[f"{name}.weight"], base[f"{name}.weight"] + 8 / 4 * b @ a, atol=1e-6)
    for untouched in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(merged[untouched], base[untouched])


def test_a_merge_in_lower_precision_says_what_it_costs(
    trained: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", f"run={trained}", "format=merged", "dtype=bfloat16", "out=mine"]) == 0
    said = difference(capsys.readouterr().out)
    assert 1e-3 < said < 1.0
    assert {t.dtype for t in load_file(work / "mine/model.safetensors").values()} == {torch.bfloat16}


def test_the_checkpoint_that_was_best(model: Path, work: Path, refused: Callable[..., str]) -> None:
    assert train(model, "steps=3", "optim.lr=0.02", "eval.every=1", "checkpoint.every=1", "run_dir=run") == 0
    best = read_json(work / "run/checkpoints/step-3/state.json")["best"][0]
    for which, step in (("best", best), ("step-2", 2)):
        if not (work / f"run/checkpoints/step-{step}").is_dir():
            continue
        assert main(["export", "run=run", f"checkpoint={which}", f"out={which}"]) == 0
        expected = (work / f"run/checkpoints/step-{step}/adapter/adapter_model.safetensors").read_bytes()
        assert (work / which / "adapter_model.safetensors").read_bytes() == expected
    assert (work / "best").is_dir()
    assert "checkpoint=step-9 is not in run; checkpoints: last, best, step-" in refused("run=run", "checkpoint=step-9")
    assert "checkpoint=first is not in run" in refused("run=run", "checkpoint=first")
    assert train(model, "steps=1", "run_dir=plain") == 0
    assert "plain was not evaluated in between (eval.every)" in refused("run=plain", "checkpoint=best")


def test_a_merged_model_in_parts(trained: Path, work: Path, refused: Callable[..., str]) -> None:
    assert main(["export", f"run={trained}", "format=merged", "max_shard_size=50KB", "out=mine"]) == 0
    assert len(list((work / "mine").glob("model-*.safetensors"))) > 1
    assert AutoModelForCausalLM.from_pretrained(work / "mine").num_parameters() > 0
    assert "max_shard_size=5 is no size" in refused(f"run={trained}", "format=merged", "max_shard_size=5", "out=x")


def test_what_cannot_be_dequantized(trained: Path, refused: Callable[..., str]) -> None:
    assert "base=dequantized is for merging" in refused(f"run={trained}", "format=merged", "base=dequantized")
    assert "base=mine is an invalid value" in refused(f"run={trained}", "base=mine")


@pytest.mark.parametrize("architecture", ["qwen3", "gpt2"])
def test_other_architectures_merge(
    architecture: str, tiny_models: dict[str, Path], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tied output layers and transposed weights."""
    assert train(tiny_models[architecture], "optim.lr=0.01", "run_dir=run") == 0
    capsys.readouterr()
    assert main(["export", "run=run", "format=merged", "out=mine"]) == 0
    assert difference(capsys.readouterr().out) < 1e-4


def test_the_default_target_lies_in_the_run(model: Path, work: Path) -> None:
    assert train(model, "steps=1") == 0
    assert main(["export"]) == 0
    assert (work / "runs/last/export-adapter/adapter_config.json").is_file()
    assert main(["export", "format=merged"]) == 0
    assert (work / "runs/last/export-merged/config.json").is_file()


# What is said meanwhile


@pytest.mark.parametrize(
    ("words", "own"),
    [
        (["format=adapter"], ["loading what was written, and comparing"]),
        (
            ["format=merged", "check=accuracy"],
            [
                "merging in float32",
                "writing the merged model",
                "loading what was written, and comparing",
                "measuring the accuracy of the trained policy",
                "measuring the accuracy of the export",
            ],
        ),
    ],
    ids=["adapter", "merged"],
)
def test_every_phase_that_takes_long_is_a_line(
    words: list[str],
    own: list[str],
    trained: Path,
    work: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On stderr, when it begins and when it ends; here all of them do."""
    monkeypatch.setattr(phases, "LONG", 0.0)
    assert main(["export", f"run={trained}", "out=mine", *words]) == 0
    captured = capsys.readouterr()
    ends = [line for line in captured.err.splitlines() if not line.endswith(" ...")]
    expected = ["loading the trained policy", "sampling the responses to compare on", *own]
    assert [line.rpartition(": ")[0] for line in ends] == expected
    assert all(re.fullmatch(r".+: \d+ s", line) for line in ends)
    assert "loading" not in captured.out


def test_a_phase_that_takes_no_time_is_no_line(trained: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", f"run={trained}", "out=mine", "format=merged"]) == 0
    assert capsys.readouterr().err == ""


# Mistakes


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str) -> str:
        assert main(["export", *words]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Traceback" not in error
        return error

    return run


def test_a_target_that_exists(trained: Path, work: Path, refused: Callable[..., str]) -> None:
    (work / "taken").mkdir()
    assert "out=taken exists already" in refused(f"run={trained}", "out=taken")
    assert list((work / "taken").iterdir()) == []
    (work / "nowhere").symlink_to("not/there")
    assert "out=nowhere exists already" in refused(f"run={trained}", "out=nowhere")


def test_a_run_that_is_not_there_or_not_finished(model: Path, work: Path, refused: Callable[..., str]) -> None:
    assert "run=runs/last points nowhere" in refused()
    (work / "half").mkdir()
    (work / "half/config.yaml").write_text("steps: 1\n")
    assert "half/config.yaml is not the config of a run of this version: it has no model" in refused("run=half")
    assert train(model, "steps=1", "run_dir=whole") == 0
    shutil.copy(work / "whole/config.yaml", work / "half/config.yaml")
    assert "run=half was not finished, and it has no complete checkpoint" in refused("run=half")


def test_a_target_below_a_file(trained: Path, work: Path, refused: Callable[..., str]) -> None:
    (work / "file").write_text("text")
    assert "out=file/mine cannot be written" in refused(f"run={trained}", "out=file/mine")


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_disk_without_room(
    form: str, trained: Path, work: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**30, 2**30, 0))
    assert "the disk has 0 MiB free" in refused(f"run={trained}", f"format={form}", "out=mine")
    assert sorted(p.name for p in work.iterdir()) == ["rewards.py"]


def test_a_base_model_that_is_gone(model: Path, work: Path, refused: Callable[..., str]) -> None:
    shutil.copytree(model, work / "base")
    assert train(Path("base"), "steps=1", "run_dir=run") == 0
    shutil.rmtree(work / "base")
    assert "/base (in" in refused("run=run", "format=merged", "out=mine")
    assert not (work / "mine").exists() and not list(work.glob(".mine*"))
