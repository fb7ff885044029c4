"""The command line: commands, help, options."""

import importlib
import os
import subprocess
import sys
from dataclasses import fields, is_dataclass
from inspect import signature
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from dppo_cli import __version__
from dppo_cli.cli.main import main
from dppo_cli.cli.table import COMMANDS
from dppo_cli.commands import schemas
from dppo_cli.config.conf_tree import config_dir, groups

pytestmark = pytest.mark.usefixtures("work")


# Commands


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_what_its_row_says(name: str) -> None:
    command = COMMANDS[name]
    assert (config_dir() / f"{name}.yaml").is_file()
    module = importlib.import_module(f"dppo_cli.commands.{command.module}")
    assert list(signature(getattr(module, f"run_{name}")).parameters) == ["config", "config_yaml"]
    schema = getattr(schemas, command.schema)
    assert is_dataclass(schema)
    if command.prepare is not None:
        assert callable(importlib.import_module(f"dppo_cli.commands.{command.prepare}").prepare)
    # A job of a sweep gets its own folder through a key that may be null.
    if command.job_key is not None:
        assert command.job_key in {f.name for f in fields(schema)}
        assert OmegaConf.load(config_dir() / f"{name}.yaml")[command.job_key] is None


def test_every_primary_config_belongs_to_a_command() -> None:
    assert {path.stem for path in config_dir().glob("*.yaml")} == {*COMMANDS, "hydra_settings"}


# Help


def test_help_shows_commands_groups_and_three_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    alone = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == alone
    lines = [line.split() for line in alone.splitlines()]
    for name, command in COMMANDS.items():
        assert [name, *command.help.split()] in lines
    assert len(groups()) == 16
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


def test_it_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "dppo_cli", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"dppo {__version__}\n", "")
    done = subprocess.run([sys.executable, "-m", "dppo_cli", "trian"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("dppo: there is no command 'trian'")


def test_help_and_mistakes_do_not_import_torch() -> None:
    code = (
        "import sys; from dppo_cli.cli.main import main\n"
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
def test_options_may_come_anywhere(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 0
    assert "steps: 7\n" in capsys.readouterr().out


def test_cfg_job_prints_the_composed_config(capsys: pytest.CaptureFixture[str], work: Path) -> None:
    assert main(["train", "approx=topk", "approx.k=7", "--cfg", "job"]) == 0
    shown = capsys.readouterr().out
    assert "approx:\n  _target_: dppo_cli.algorithm.approx.TopK\n  k: 7\n" in shown
    assert sorted(p.name for p in work.iterdir()) == ["rewards.py"]


@pytest.mark.parametrize("given", [None, "7"])
@pytest.mark.parametrize(
    ("name", "default"),
    [("GOMP_SPINCOUNT", "10000"), ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128"), ("LRU_CACHE_CAPACITY", "32")],
)
def test_limits_of_the_libraries_are_set_unless_the_user_has_set_them(
    name: str, default: str, given: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    assert main(["train", "--cfg", "job"]) == 0
    assert os.environ[name] == (given or default)


@pytest.mark.parametrize("name", ["XDG_CONFIG_HOME", "XDG_CACHE_HOME"])
@pytest.mark.parametrize(("given", "left"), [("relative", None), ("", None), ("/its/own", "/its/own")])
def test_a_relative_folder_of_the_user_is_ignored(
    name: str, given: str, left: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """reasoning-gym imports matplotlib, which would make it in the working directory."""
    monkeypatch.setenv(name, given)
    assert main(["--version"]) == 0
    assert os.environ.get(name) == left


# Searches


def sweeper(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    """What the sweeper is told by a command line."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="needs the extra dppo[sweeps]")
    assert main(["train", "--cfg", "hydra", "hydra/sweeper=optuna", *words]) == 0
    found: dict[str, object] = yaml.safe_load(capsys.readouterr().out)["hydra"]["sweeper"]
    return found


def test_a_search_looks_for_the_largest_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    """The plugin by itself looks for the smallest value, and ends when a trial fails."""
    found = sweeper(capsys)
    assert found["_target_"] == "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    assert (found["direction"], found["max_failure_rate"]) == ("maximize", 1.0)


def test_what_the_user_says_of_a_search_wins(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["hydra.sweeper.direction=minimize", "hydra.sweeper.max_failure_rate=0.5", "hydra.sweeper.n_trials=3"]
    for given in (words, words[::-1]):
        found = sweeper(capsys, *given)
        assert (found["direction"], found["max_failure_rate"], found["n_trials"]) == ("minimize", 0.5, 3)
