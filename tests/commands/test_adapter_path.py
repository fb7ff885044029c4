"""`dppo train adapter.path=FOLDER`: a run that starts from the adapter of another, and what it refuses."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from disturbed import contents, fail_at, outcome
from helpers import read_json, train, train_words, write_rewards
from omegaconf import OmegaConf
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dppo_cli.cli.main import main
from dppo_cli.commands import train as command
from dppo_cli.policy.adapter import CONFIG, WEIGHTS
from dppo_cli.training.run_folder import RunFolder

IDS = torch.tensor([[3, 4, 13, 5, 6, 15], [9, 14, 10, 15, 3, 3]])
RESUMES = ("resume=run", "resume=auto")
MEASURED = ("eval.success_reward=0.45", "optim.lr=0.02", "data.eval_problems=16")


@pytest.fixture(scope="module")
def first(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a DoRA adapter of rank 3. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_rewards(folder)
        words = ["adapter=dora", "adapter.r=3", "adapter.alpha=5", "adapter.target_modules=[v_proj,down_proj]"]
        assert train(tiny_models["llama3"], *words, *MEASURED, "run_dir=run") == 0
    return folder / "run"


@pytest.fixture
def adapter(first: Path, work: Path) -> Path:
    """A copy of its adapter, in the working folder, which a test may damage."""
    return Path(shutil.copytree(first / "adapter", work / "start"))


def go_on(model: Path, *words: str) -> int:
    """`dppo train adapter.path=start ...` with the defaults of the adapter's YAML."""
    usual = [word for word in train_words(model) if not word.startswith("adapter.")]
    return main(["train", *usual, "adapter.path=start", "steps=1", "run_dir=run", *words])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("dppo: ")
    return error


def configure(folder: Path, **values: object) -> None:
    (folder / CONFIG).write_text(json.dumps({**read_json(folder / CONFIG), **values}))


def change(folder: Path, of: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    of(tensors)
    save_file(tensors, folder / WEIGHTS)


# What it starts from


def test_a_run_starts_where_the_other_ended(model: Path, first: Path, adapter: Path, work: Path) -> None:
    assert go_on(model, *MEASURED) == 0
    config = OmegaConf.to_container(OmegaConf.load(work / "run/config.yaml")["adapter"])
    expected = {"r": 3, "alpha": 5.0, "dropout": 0.0, "target_modules": ["down_proj", "v_proj"], "quantization": None}
    assert config == expected | {"use_dora": True, "use_rslora": False, "path": str(adapter)}
    before, after = read_json(first / "summary.json"), read_json(work / "run/summary.json")
    assert after["eval_before"] == before["eval_after"] != before["eval_before"]
    assert after["trained_parameters"] == before["trained_parameters"]
    saved = read_json(work / "run/adapter" / CONFIG)
    assert {key: saved[key] for key in ("r", "lora_alpha", "use_dora")} == {"r": 3, "lora_alpha": 5, "use_dora": True}
    moved = load_file(work / "run/adapter" / WEIGHTS)
    steps = [float((moved[name] - t).abs().max()) for name, t in load_file(adapter / WEIGHTS).items()]
    # AdamW moves a weight by about the learning rate; a fresh adapter would be further away.
    assert min(steps) > 0 and max(steps) < 0.1
    assert "# DoRA adapter for" in (work / "run/adapter/README.md").read_text()

    # What reads a run needs nothing else.
    shutil.rmtree(adapter)
    assert main(["eval", "run=run", "out=measured", "seed=1"]) == 0
    assert read_json(work / "measured/summary.json")["accuracy"] == after["eval_after"]
    assert main(["export", "run=run", "out=plain"]) == main(["export", "run=run", "format=merged", "out=merged"]) == 0
    base = AutoModelForCausalLM.from_pretrained(model)
    merged = AutoModelForCausalLM.from_pretrained(work / "merged")(IDS).logits
    plain = PeftModel.from_pretrained(base, str(work / "plain"))(IDS).logits
    torch.testing.assert_close(plain, merged, rtol=1e-5, atol=2e-5)
    with torch.no_grad():
        assert (merged - AutoModelForCausalLM.from_pretrained(model)(IDS).logits).abs().max() > 0.1


def test_a_quantised_base_is_the_users_choice(model: Path, adapter: Path, work: Path) -> None:
    assert go_on(model, "adapter=qdora", "adapter.target_modules=[v_proj,down_proj]", "adapter.r=3") == 0
    config = OmegaConf.load(work / "run/config.yaml")["adapter"]
    assert (config.quantization, config.use_dora, config.alpha) == ("nf4", True, 5)
    assert "# QDoRA adapter for" in (work / "run/adapter/README.md").read_text()
    for form in ("adapter", "merged"):
        assert main(["export", "run=run", f"format={form}", f"out={form}"]) == 0


# What the user says besides


@pytest.mark.parametrize(
    ("word", "mine", "theirs"),
    [
        ("adapter.r=8", "r=8", "r=3"),
        ("++adapter.alpha=6", "alpha=6", "alpha=5.0"),
        ("adapter.dropout=0.1", "dropout=0.1", "dropout=0.0"),
        ("adapter.target_modules=[q_proj]", 'target_modules=["q_proj"]', 'target_modules=["down_proj", "v_proj"]'),
        ("adapter.use_rslora=true", "use_rslora=true", "use_rslora=false"),
        ("adapter=lora", "use_dora=false", "use_dora=true"),
        ("adapter=qlora", "use_dora=false", "use_dora=true"),
    ],
)
def test_what_differs_is_an_error_that_names_both(
    word: str, mine: str, theirs: str, model: Path, adapter: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert go_on(model, word) == 2
    assert one_line(capsys) == (
        f"dppo: {word} means {mine}, but the adapter in {adapter}, which training goes on with, has {theirs}; leave "
        f"{word} out\n"
    )
    assert not (work / "run").exists()


# What cannot be started from


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def to_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")


def to_a_loop(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder.name)


def into_a_run(folder: Path) -> None:
    folder.rename(folder.with_name("adapter"))
    folder.mkdir()
    folder.with_name("adapter").rename(folder / "adapter")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: shutil.rmtree(f), "adapter.path={f} is not a folder here"),
        (to_a_loop, "adapter.path={f} is not a folder here"),
        (remove(CONFIG), "adapter.path={f} has no adapter_config.json; it must be the folder of a PEFT adapter"),
        (remove(WEIGHTS), "adapter.path={f} has no adapter_model.safetensors"),
        (to_pickle, "adapter.path={f} has no adapter_model.safetensors (pickled .bin weights are not read"),
        (into_a_run, "adapter.path={f} has no adapter_config.json; use adapter.path={f}/adapter"),
        (lambda f: (f / CONFIG).write_text("{"), "{f}/adapter_config.json cannot be read: "),
        (lambda f: (f / WEIGHTS).write_bytes(b"no"), "{f}/adapter_model.safetensors cannot be read: "),
        (lambda f: configure(f, peft_type="LOHA"), "{f}/adapter_config.json says peft_type=LOHA"),
        (lambda f: configure(f, modules_to_save=["lm_head"]), "{f}/adapter_config.json says modules_to_save="),
        (lambda f: configure(f, r=4), "is [3, 64]; expected [4, 64]"),
        (lambda f: configure(f, target_modules=["c_attn"]), "the adapter in {f} does not fit the base: its target_mo"),
        (lambda f: configure(f, target_modules=["lm_head"]), "['lm_head'] includes the output layer, which must stay"),
        (lambda f: configure(f, use_dora=False), "has an unknown base_model.model.model.layers.0.mlp.down_proj.lora_m"),
        (
            lambda f: change(f, lambda t: t.update({name: tensor * torch.nan for name, tensor in t.items()})),
            "holds values that are not finite numbers; it is broken",
        ),
        (
            lambda f: change(
                f, lambda t: t.update({n.replace("layers.1", "layers.2"): v.clone() for n, v in t.items()})
            ),
            "layers.2.mlp.down_proj.lora_A.weight, and 5 more; it is an adapter for another base",
        ),
        (
            lambda f: change(f, lambda t: t.update({n: v[..., :-1].clone() for n, v in t.items() if "lora_A" in n})),
            "is [3, 63]; expected [3, 64]; it is an adapter for another base",
        ),
    ],
)
def test_one_line_and_nothing_written(
    damage: Callable[[Path], Any],
    says: str,
    model: Path,
    adapter: Path,
    work: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage(adapter)
    before = contents(work)
    assert go_on(model) == 2
    assert says.replace("{f}", str(adapter)) in one_line(capsys)
    assert contents(work) == before


# A run that goes on


def test_a_run_that_goes_on_does_not_read_its_start_again(
    model: Path, adapter: Path, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, or with the same words; the folder may be gone, or hold something else."""
    words = ["adapter=dora", "steps=2", "run_dir=run"]
    assert go_on(model, *words[:2], "run_dir=undisturbed") == 0
    with monkeypatch.context() as patch:
        fail_at(2, RunFolder, "log", patch)
        assert go_on(model, *words) == 130
    shutil.copytree(work / "run", work / "stopped")
    change(adapter, lambda t: t.update({name: tensor * torch.nan for name, tensor in t.items()}))
    for again in (lambda: main(["train", "resume=run"]), *(lambda w=w: go_on(model, *words, w) for w in RESUMES)):
        shutil.rmtree(work / "run")
        shutil.copytree(work / "stopped", work / "run")
        assert again() == 0
        assert outcome(work / "run") == outcome(work / "undisturbed")
        shutil.rmtree(adapter, ignore_errors=True)


def test_a_run_that_starts_anew_needs_the_folder(
    model: Path, adapter: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was killed before its first checkpoint."""
    with monkeypatch.context() as patch:
        fail_at(2, RunFolder, "log", patch)
        patch.setattr(command, "rescue", lambda error, *rest: (error, None))
        assert go_on(model, "steps=2") == 130
    adapter.rename(work / "elsewhere")
    capsys.readouterr()
    assert main(["train", "resume=run"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"dppo: adapter.path={adapter} is not a folder here")
    assert sorted(path.name for path in (work / "run").iterdir() if path.name != ".lock") == [
        "config.yaml",
        "eval_before.json",
        "metrics.jsonl",
        "samples",
    ]
    (work / "elsewhere").rename(adapter)
    assert main(["train", "resume=run"]) == 0


def test_a_run_that_goes_on_keeps_its_start(
    model: Path, adapter: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        fail_at(2, RunFolder, "log", patch)
        assert go_on(model, "steps=2") == 130
    shutil.copytree(adapter, work / "other")
    for words in (["resume=run"], [*train_words(model, "run_dir=run", "steps=2", "resume=auto")]):
        capsys.readouterr()
        assert main(["train", *(w for w in words if not w.startswith("adapter.")), "adapter.path=other"]) == 2
        error = one_line(capsys)
        assert f"adapter.path={work}/other cannot replace adapter.path={adapter}" in error
