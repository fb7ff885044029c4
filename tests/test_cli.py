"""The command line: help, options, Ctrl-C."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import read_json, read_lines, train
from peft import PeftModel
from transformers import AutoModelForCausalLM

from dppo_cli import __version__
from dppo_cli.cli import COMMANDS, main
from dppo_cli.conf_tree import groups
from dppo_cli.learner import Learner
from dppo_cli.rollout.local import LocalEngine

pytestmark = pytest.mark.usefixtures("work")


# Help


def test_help_shows_commands_groups_and_three_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == alone
    lines = [line.split() for line in alone.splitlines()]
    for command, text in COMMANDS.items():
        assert [command, *text.split()] in lines
    assert len(groups()) == 13
    for group, choices in groups().items():
        assert [group, *", ".join(choices).split()] in lines
    examples = alone.split("examples:\n")[1].splitlines()
    assert len(examples) == 3 and all(line.startswith("  dppo train") for line in examples)


def test_the_examples_of_the_help_compose(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    for line in capsys.readouterr().out.split("examples:\n")[1].splitlines():
        words = [word.partition(",")[0] for word in line.split()[1:] if word != "-m"]
        assert main([*words, "--cfg", "job"]) == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dppo {__version__}\n"


def test_help_and_mistakes_do_not_import_torch() -> None:
    code = (
        "import sys; from dppo_cli.cli import main\n"
        "assert main(['--help']) == 0 and main(['--version']) == 0\n"
        "assert main(['trian']) == 2 and main(['train', 'divergence=vt']) == 2 and main(['train', 'sed=1']) == 2\n"
        "assert main(['train', '--cfg', 'job']) == 0\n"
        "assert 'hydra' in sys.modules and 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words", [["--cfg", "job", "steps=7"], ["steps=7", "--cfg", "job"], ["steps=7", "--cfg=job", "seed=2"]]
)
def test_options_may_stand_anywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 0
    assert "steps: 7\n" in capsys.readouterr().out


def test_cfg_job_prints_the_composed_config(capsys: pytest.CaptureFixture[str], work: Path) -> None:
    assert main(["train", "approx=topk", "approx.k=7", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "approx:\n  _target_: dppo_cli.algorithm.approx.TopK\n  k: 7\n" in shown
    assert sorted(p.name for p in work.iterdir()) == ["rewards.py"]


@pytest.mark.parametrize("given", [None, "7"])
@pytest.mark.parametrize(("name", "default"), [("GOMP_SPINCOUNT", "10000"), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")])
def test_limits_of_the_libraries_are_set_unless_the_user_has_set_them(
    name: str, default: str, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    assert main(["train", "--cfg", "job"]) == 0
    assert os.environ[name] == (given or default)


# Ctrl-C


def interrupt_at(call: int, owner: type, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C during the `call`th call of a method."""
    real, calls = getattr(owner, method), []

    def interrupted(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(owner, method, interrupted)


def test_ctrl_c_saves_the_adapter_as_it_is(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, "steps=2", "run_dir=whole") == 0
    with monkeypatch.context() as patch:
        interrupt_at(4, LocalEngine, "generate", patch)  # The first evaluation, step 1, step 2, step 3.
        assert train(model, "steps=5", "run_dir=cut") == 130
    captured = capsys.readouterr()
    assert "interrupted: saving the adapter as it is after step 2" in captured.out
    assert captured.err == "dppo: interrupted\n"
    summary = read_json(work / "cut/summary.json")
    assert (summary["steps"], summary["interrupted"], summary["eval_after"]) == (2, True, None)
    assert len(read_lines(work / "cut/metrics.jsonl")) == 2
    # What was saved is what a run of two steps saves, and opens.
    weights = "adapter/adapter_model.safetensors"
    assert (work / "cut" / weights).read_bytes() == (work / "whole" / weights).read_bytes()
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(work / "cut/adapter"))


@pytest.mark.parametrize(("owner", "method"), [(LocalEngine, "generate"), (Learner, "update")])
def test_ctrl_c_before_the_first_step_leaves_nothing(
    owner: type,
    method: str,
    model: Path,
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    interrupt_at(1, owner, method, monkeypatch)
    assert train(model, "run_dir=run") == 130
    captured = capsys.readouterr()
    assert "interrupted: no step was finished, nothing is saved" in captured.out
    assert captured.err == "dppo: interrupted\n"
    assert sorted(p.name for p in work.iterdir() if p.name != "__pycache__") == ["rewards.py"]


def test_ctrl_c_while_loading_leaves_nothing(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(1, Learner, "__init__", monkeypatch)
    assert train(model, "run_dir=run") == 130
    assert capsys.readouterr().err == "dppo: interrupted\n"
    assert not (work / "run").exists()


def test_ctrl_c_ends_a_sweep(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    interrupt_at(4, Learner, "update", monkeypatch)
    assert train(model, "-m", "seed=1,2,3", "steps=3", "batch.prompts_per_update=2", "run_dir=sweep") == 130
    assert capsys.readouterr().err == "dppo: interrupted\n"
    assert sorted(p.name for p in (work / "sweep").iterdir()) == ["0", "multirun.yaml"]
    assert read_json(work / "sweep/0/summary.json")["steps"] == 3
