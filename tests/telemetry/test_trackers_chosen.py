"""Which trackers are meant, and those that are not installed."""

import importlib.metadata

import pytest

from dppo_cli.errors import ConfigError
from dppo_cli.telemetry.trackers import check_installed, chosen


def test_which_trackers_are_meant() -> None:
    assert chosen("none") == []
    assert chosen("wandb") == ["wandb"]
    assert chosen(["mlflow", "wandb", "mlflow"]) == ["mlflow", "wandb"]
    with pytest.raises(ConfigError, match="tracker=wand is an invalid value; did you mean 'wandb'"):
        chosen(["tensorboard", "wand"])
    with pytest.raises(ConfigError, match="leave it out"):
        chosen(["none", "wandb"])
    with pytest.raises(ConfigError, match="tracker=3"):
        chosen(3)


def test_one_that_is_not_installed_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "mlflow-skinny":
            raise importlib.metadata.PackageNotFoundError(name)
        return "3.0"

    monkeypatch.setattr(importlib.metadata, "version", version)
    for name, install in (("tensorboard", r"'dppo\[trackers\]'"), ("wandb", "wandb"), ("trackio", "trackio")):
        with pytest.raises(ConfigError, match=f"tracker={name} needs .*: pip install {install}"):
            check_installed([name])
    check_installed("mlflow")
    check_installed("none")
