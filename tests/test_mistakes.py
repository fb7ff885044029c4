"""One clear line for every mistake, which leaves nothing on the disk."""

import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import read_json, read_lines, train

from dppo_cli.cli import main
from dppo_cli.conf_tree import config_dir

DiskUsage = namedtuple("DiskUsage", "total used free")

pytestmark = pytest.mark.usefixtures("work")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], work: Path) -> Callable[..., str]:
    """`refused("train", "steps=0")`: runs it, checks what holds for every mistake, returns the line shown."""

    def run(*words: str) -> str:
        before = sorted(work.rglob("*"))
        status = main(list(words))
        captured = capsys.readouterr()
        assert status == 2
        assert captured.err.count("\n") == 1 and captured.err.startswith("dppo: ")
        assert "Traceback" not in captured.out
        left = [p for p in sorted(work.rglob("*")) if p not in before and "__pycache__" not in p.parts]
        assert left in ([], [work / "runs"])  # An empty runs/ may stay.
        return captured.err.removeprefix("dppo: ").strip()

    return run


def on_tiny(model: Path, *overrides: str) -> list[str]:
    """Words of a `dppo train` that would run if the overrides let it."""
    size = [] if "data=file" in overrides else ["data.train_problems=32"]
    return ["train", "model=hf", f"model.path={model}", "batch=small", "data.eval_problems=4", *size, *overrides]


# Words that are no command, option, group, choice or key


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["no command 'trian'", "did you mean 'train'?", "Choices: eval, export, train"]),
        (["train", "--steps", "5"], ["no option '--steps'", "key=value"]),
        (["train", "--cfg", "jobb"], ["--cfg job"]),
        (["train", "steps", "5"], ["cannot read 'steps'", "key=value"]),
        (["train", "divergence=tv,"], ["cannot read 'divergence=tv,'"]),
        (["train", "divergance=tv"], ["no key divergance", "did you mean divergence?", "advantage, aggregation"]),
        (["train", "approx=topkk"], ["no approx=topkk", "did you mean 'topk'?", "Choices: binary, full, topk"]),
        (["train", "approx=null"], ["no approx=null", "Choices: binary, full, topk"]),
        (["train", "seeed=1"], ["no key seeed", "did you mean seed?", "steps"]),
        (
            ["train", "divergence.delta_hi=1"],
            ["no key divergence.delta_hi", "did you mean divergence.delta_high?", "delta_high, delta_low"],
        ),
        (["train", "approx.k=5"], ["no key approx.k"]),
        (["train", "data=file", "data.train_problems=9"], ["no key data.train_problems", "Choices in data: answer_c"]),
        (["train", "+unknown.key=1"], ["no key 'unknown'", "Choices: adapter"]),
        (["train", "+divergence.detla=1"], ["no key divergence.detla", "did you mean 'delta_low'?"]),
        (["train", "approx=topk,binary"], ["approx=topk,binary", "add -m"]),
        (["train", "recipe=nowhere"], ["no recipe 'nowhere'"]),
        (["train", "~divergence"], ["divergence is not set"]),
        (["eval", "divergence=tv"], ["no key divergence", "Choices: data, hardware, model"]),
        (["eval", "model=smollm2_135m"], ["model cannot be set as a whole", "model.path"]),
        (["export", "fromat=merged"], ["no key fromat", "did you mean format?"]),
        (["export", "format=merge"], ["format=merge is no choice", "did you mean 'merged'?", "adapter, merged"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and value[0].isalpha() else None,
)
def test_misspelt_words(words: list[str], parts: list[str], refused: Callable[..., str]) -> None:
    line = refused(*words)
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["divergence=kl", "sampling.temprature=1"], "no key sampling.temprature; did you mean sampling.temperature?"),
        (["divergence=kll"], "no divergence=kll; did you mean 'kl'?"),
        (["-m", "approx=full,topkk", "steps=1"], "no approx=topkk; did you mean 'topk'?"),
    ],
)
def test_a_word_that_no_file_has_is_answered_without_hydra(words: list[str], says: str, work: Path) -> None:
    """Hydra would compose first; and torch is far away."""
    code = (
        "import sys; from dppo_cli.cli import main\n"
        f"assert main(['train', *{words}]) == 2\n"
        "assert not {'hydra', 'omegaconf', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert says in done.stderr


def test_a_choice_in_a_folder_of_the_users_own_is_found(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "own/divergence").mkdir(parents=True)
    shutil.copy(config_dir() / "divergence/tv.yaml", work / "own/divergence/mine.yaml")
    assert main(["train", "--config-dir", "own", "divergence=mine", "--cfg", "job"]) == 0
    assert "dppo_cli.algorithm.divergence.TotalVariation" in capsys.readouterr().out
    assert main(["train", "--config-dir", "own", "divergence=mien", "--cfg", "job"]) == 2
    assert "no divergence=mien" in capsys.readouterr().err


# Values


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["steps=many"], ["steps", "'many'"]),
        (["steps=1.5"], ["steps", "1.5"]),
        (["divergence.delta_high=wide"], ["divergence.delta_high", "'wide'"]),
        (["optim.betas=0.9"], ["optim.betas"]),
        (["model=hf"], ["model.path is not set; add model.path=..."]),
        (["data=file"], ["data.path is not set; add data.path=..."]),
        (["reward=function"], ["reward.path is not set; add reward.path=..."]),
        (["divergence.delta_low=-0.1"], ["divergence.delta_low=-0.1", "[0, 1]", "tv"]),
        (["divergence=kl", "divergence.delta_high=-0.1"], ["divergence.delta_high=-0.1", "kl"]),
        (["divergence.delta_high=1.5"], ["divergence.delta_high=1.5", "[0, 1]"]),
        (["divergence.delta_high=nan"], ["divergence.delta_high=nan"]),
        (["batch.samples_per_prompt=1"], ["batch.samples_per_prompt=1", "at least 2"]),
        (["batch.samples_per_prompt=0"], ["batch.samples_per_prompt=0", "samples_per_prompt >= 1"]),
        (
            ["batch.prompts_per_step=32", "batch.prompts_per_update=5"],
            ["batch.prompts_per_update=5", "batch.prompts_per_step=32"],
        ),
        (["sampling.top_p=0.9"], ["sampling.top_p", "top_p=1"]),
        (["sampling.top_k=50"], ["top_k", "top_k=0"]),
        (["sampling.min_p=0.1"], ["min_p", "min_p=0"]),
        (["sampling.temperature=0"], ["sampling.temperature=0", "greedy"]),
        (["sampling.temperature=-1"], ["sampling.temperature=-1", "temperature >= 0"]),
        (["approx=topk", "approx.k=5000"], ["approx.k=5000", "rollout.max_logprobs=1024"]),
        (["approx=topk", "approx.k=0"], ["approx.k=0", "at least 1"]),
        (["adapter=qlora", "rollout.merge=true"], ["rollout.merge=true", "nf4", "rollout.merge=false"]),
        (["adapter.quantization=int3"], ["adapter.quantization=int3", "nf4, null"]),
        (["rollout.merge=false", "rollout.dtype=bfloat16"], ["rollout.dtype=bfloat16", "rollout.merge=true"]),
        (["objective.ratio_cap=0.5"], ["objective.ratio_cap=0.5", "at least 1"]),
        (["objective=ppo", "objective.eps_low=0"], ["objective.eps_low=0", "positive"]),
        (["optim.lr=-1"], ["optim.lr=-1", "lr > 0"]),
        (["optim.schedule=linear"], ["optim.schedule=linear", "constant, cosine"]),
        (["steps=0"], ["steps=0", "dppo eval"]),
        (["anchor=pi_old"], ["anchor=pi_old", "recompute, rollout"]),
        (["kl_to_reference=-1"], ["kl_to_reference=-1"]),
        (["prompt.system=Hi"], ["prompt.system", "template=chat"]),
        (["data.eval_problems=3000"], ["data.eval_problems", "3000", "2000"]),
        (["divergence._target_=dppo_cli.algorithm.divergence.TV"], ["cannot be imported", "TV"]),
        (["divergence._target_=json.JSONDecoder"], ["json.JSONDecoder is not a dataclass"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] and len(value) < 3 else None,
)
def test_values_that_cannot_work(overrides: list[str], parts: list[str], refused: Callable[..., str]) -> None:
    line = refused("train", *overrides)
    for part in parts:
        assert part in line


def test_a_kl_threshold_on_the_scale_of_tv_is_warned_of_but_runs(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, "divergence=kl", "divergence.delta_high=0.2", "steps=1", "run_dir=run") == 0
    said = capsys.readouterr().out
    assert "warning: divergence.delta_high=0.2 lies outside 0.05 to 0.15" in said
    (warning,) = read_json(work / "run/summary.json")["warnings"][:1]
    assert warning.startswith("divergence.delta_high=0.2 lies outside 0.05 to 0.15")


# Models


def test_a_model_that_is_not_there(refused: Callable[..., str]) -> None:
    assert "no model folder nowhere" in refused(*on_tiny(Path("nowhere")))
    assert refused(*on_tiny(Path("embedded:nothing"))).startswith("there is no embedded model 'nothing'. Choices:")


def test_weights_that_are_not_on_this_machine(refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo_cli.policy.loading._hub_answers", lambda: False)
    line = refused("train", "model=llama3_8b", "divergence=tv", "approx=topk")
    assert "meta-llama/Llama-3.1-8B-Instruct" in line
    assert "`hf download meta-llama/Llama-3.1-8B-Instruct --local-dir Llama-3.1-8B-Instruct`" in line
    assert "model.path=Llama-3.1-8B-Instruct" in line


@pytest.mark.parametrize(
    ("missing", "says"),
    [("config.json", "no config.json"), ("model.safetensors", "no weights"), ("tokenizer.json", "tokenizer")],
)
def test_a_model_folder_with_a_file_missing(
    missing: str, says: str, model: Path, work: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(model, work / "half")
    (work / "half" / missing).unlink()
    line = refused(*on_tiny(Path("half")))
    assert "half" in line and says in line


def test_a_gpu_that_is_not_there(model: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "hardware=cpu" in refused(*on_tiny(model, "hardware=gpu_24gb"))


def test_an_adapter_on_layers_that_are_not_there(model: Path, refused: Callable[..., str]) -> None:
    assert "adapter.target_modules" in refused(*on_tiny(model, "adapter.target_modules=[no_proj]"))


# Data


def lines_of(*rows: object) -> str:
    return "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)


GOOD = {"prompt": "1+1=", "answer": "2"}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["problems.jsonl is empty"]),
        ("\n \n", ["problems.jsonl is empty"]),
        (lines_of(GOOD, "{oops", GOOD), ["problems.jsonl, line 2", "JSON"]),
        (lines_of(GOOD, "", "[1, 2]"), ["problems.jsonl, line 3", "list"]),
        (lines_of(GOOD, {"prompt": "1+2="}), ["problems.jsonl, line 2", "no column 'answer'", "data.answer_column"]),
        (lines_of({"promt": "1+2=", "answer": "3"}), ["line 1", "no column 'prompt'", "did you mean 'promt'?"]),
        (lines_of({"prompt": ["1"], "answer": "3"}), ["line 1", "column 'prompt' holds list"]),
        (lines_of(GOOD, {"prompt": " ", "answer": "3"}), ["line 2", "prompt is empty"]),
        (lines_of(GOOD, GOOD), ["has 2 problems", "data.eval_problems=4", "data.eval_path"]),
    ],
)
def test_data_files(content: str, parts: list[str], model: Path, work: Path, refused: Callable[..., str]) -> None:
    (work / "problems.jsonl").write_text(content, encoding="utf-8")
    line = refused(*on_tiny(model, "data=file", "data.path=problems.jsonl"))
    for part in parts:
        assert part in line


def test_a_data_file_that_is_not_there(model: Path, refused: Callable[..., str]) -> None:
    assert "no file nowhere.jsonl" in refused(*on_tiny(model, "data=file", "data.path=nowhere.jsonl"))


def test_a_chat_template_that_is_not_there(model: Path, work: Path, refused: Callable[..., str]) -> None:
    shutil.copytree(model, work / "plain")
    (work / "plain/chat_template.jinja").unlink()
    assert "no chat template; use prompt.template=plain" in refused(*on_tiny(Path("plain"), "prompt.template=chat"))


# Rewards


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("rewards.py", "names no function"),
        ("nowhere.py:share", "no file nowhere.py"),
        ("rewards.py:evne", "did you mean 'even'?"),
        ("no_such_module:f", "cannot be imported"),
    ],
)
def test_reward_functions_that_cannot_be_found(path: str, says: str, model: Path, refused: Callable[..., str]) -> None:
    assert says in refused(*on_tiny(model, "reward=function", f"reward.path={path}"))


def test_a_reward_function_that_fails_leaves_no_run(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, "reward.path=rewards.py:broken", "run_dir=run") == 2
    error = capsys.readouterr().err
    assert error == f"dppo: the reward function {work}/rewards.py:broken failed: ValueError: no idea\n"
    assert not (work / "run").exists() and not (work / "runs").exists()


def test_a_reward_function_that_fails_later_leaves_the_steps(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a run without a finished step is removed."""
    (work / "late.py").write_text(
        "calls = []\ndef f(prompts, completions, **columns):\n"
        "    calls.append(1)\n    assert len(calls) < 4, 'tired'\n    return [float(len(c)) for c in completions]\n"
    )
    assert train(model, "reward.path=late.py:f", "run_dir=run", "steps=5") == 2
    assert "AssertionError: tired" in capsys.readouterr().err
    assert [row["step"] for row in read_lines(work / "run/metrics.jsonl")] == [1, 2]


# Folders


def test_a_run_folder_that_holds_a_run(model: Path, work: Path, refused: Callable[..., str]) -> None:
    (work / "run").mkdir()
    (work / "run/config.yaml").write_text("steps: 1\n")
    assert "run_dir=run already holds a run" in refused(*on_tiny(model, "run_dir=run"))
    assert (work / "run/config.yaml").read_text() == "steps: 1\n"


def test_a_run_folder_that_holds_something_else(model: Path, work: Path, refused: Callable[..., str]) -> None:
    assert "is not empty" in refused(*on_tiny(model, f"run_dir={work}"))
    assert (work / "rewards.py").exists()


def test_a_run_folder_that_is_or_lies_below_a_file(model: Path, work: Path, refused: Callable[..., str]) -> None:
    (work / "file").write_text("text")
    assert "run_dir=file is a file" in refused(*on_tiny(model, "run_dir=file"))
    assert "file is a file" in refused(*on_tiny(model, "run_dir=file/run"))


def test_a_folder_without_write_permission(
    model: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    line = refused(*on_tiny(model, "run_dir=below/run"))
    assert "run_dir=below/run cannot be written" in line and "no permission" in line


def test_a_folder_that_cannot_be_made_after_all(
    model: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def mkdir(self: Path, *args: Any, **options: Any) -> None:
        if self == Path("run"):
            raise PermissionError(13, "Permission denied")
        real(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert refused(*on_tiny(model, "run_dir=run")) == "run_dir=run cannot be written: Permission denied"


def test_a_disk_without_room(model: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(2**40, 2**40 - 2**20, 2**20))
    line = refused(*on_tiny(model, "run_dir=run"))
    assert "run needs" in line and "the disk has 1 MiB free" in line
