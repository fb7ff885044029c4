"""Models, data, reward functions and folders that cannot be used: one line, and nothing on the disk."""

import json
import os
import re
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import read_lines, train

DiskUsage = namedtuple("DiskUsage", "total used free")

pytestmark = pytest.mark.usefixtures("work")


def on_tiny(model: Path, *overrides: str) -> list[str]:
    """Words of a `dppo train` that would run if the overrides let it."""
    size = ["sampling.max_new_tokens=8"] + ([] if "data=file" in overrides else ["data.train_problems=32"])
    return ["train", "model=hf", f"model.path={model}", "batch=small", "data.eval_problems=4", *size, *overrides]


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
        (lines_of({"prompt": ["1"], "answer": "3"}), ["line 1", "message 1 is no object with the keys role"]),
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
    error, nothing = capsys.readouterr().err, "no step was finished; nothing is saved"
    where = r"\(rewards\.py, line \d+, in broken\)"
    failed = rf"dppo: the reward function {re.escape(str(work))}/rewards\.py:broken failed: ValueError: no idea {where}"
    assert re.fullmatch(f"{failed}; {nothing}\n", error)
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
    saved = "the state after step 2 is saved; to go on: dppo train resume=run"
    assert capsys.readouterr().err.endswith(f"AssertionError: tired (late.py, line 4, in f); {saved}\n")
    assert [row["step"] for row in read_lines(work / "run/metrics.jsonl")] == [1, 2]


# Folders


def test_a_run_folder_that_holds_a_run(model: Path, work: Path, refused: Callable[..., str]) -> None:
    (work / "run").mkdir()
    (work / "run/config.yaml").write_text("steps: 1\n")
    says = "run_dir=run already holds a run; add resume=auto to go on with it, name a new folder, or delete it first"
    assert says in refused(*on_tiny(model, "run_dir=run"))
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


@pytest.mark.parametrize("words", [["eval", "run=nowhere"], ["export", "run=nowhere"]], ids=lambda words: words[0])
def test_only_what_is_written_has_to_be_writable(
    words: list[str],
    tmp_path_factory: pytest.TempPathFactory,
    refused: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A single job writes no sweep, so the working folder need not be writable."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).is_relative_to(elsewhere))
    assert "run=nowhere points nowhere" in refused(*words, f"out={elsewhere}/out")


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
