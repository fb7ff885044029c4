"""What the commands that read a run share."""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build


def read_run_config(run: Path) -> TrainConfig:
    """The config a run was trained with."""
    node = OmegaConf.load(run / "config.yaml")
    assert isinstance(node, DictConfig)
    return build(TrainConfig, node)
