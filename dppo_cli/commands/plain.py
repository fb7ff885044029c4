"""What commands that use a run or a plain model start from: the run's config, or what holds where nobody says."""

from collections.abc import Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dppo_cli.commands.trained import folder_of, run_config
from dppo_cli.config.conf_tree import config_dir
from dppo_cli.errors import ConfigError

CHOICES = {"reward": "exact", "environment": "none", "rollout": "local", "hardware": "auto"}
"""Of the groups, for a plain model."""
PLAIN: dict[str, Any] = {
    "adapter": None,
    "prompt": {"template": "plain", "system": None, "template_kwargs": {}, "too_long": "refuse"},
    "sampling": {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_new_tokens": 256, "stop": []},
    "eval": {"temperature": 1.0, "success_reward": 1.0},
}
"""How a plain model is used where the user does not say."""


def base_config(node: DictConfig, what: str, sections: Sequence[str]) -> DictConfig:
    """The config that `node` is filled from: that of `run`, or of the plain model `model.path`.

    Both with those of `sections` that the user has set. `what` is done to it, for messages. Raises ConfigError unless
    there is one of the two, RunError if the run cannot be used.
    """
    run, path = node.run, node.model.path
    if (run is None) == (path is None):
        raise ConfigError(f"name what to {what}: a run (run=runs/last) or a plain model (model.path=...), one of them")
    own = OmegaConf.masked_copy(node, list(sections))
    if run is not None:
        return run_config(folder_of(str(run)), own, bool(node.trust))
    chosen = {name: section for name, section in own.items() if section is not None}
    defaults = {
        name: OmegaConf.load(config_dir() / name / f"{choice}.yaml")
        for name, choice in CHOICES.items()
        if name in sections and "_target_" not in chosen.get(name, {})
    }
    base = OmegaConf.merge(PLAIN, {"model": node.model}, defaults, chosen)
    assert isinstance(base, DictConfig)
    return base
