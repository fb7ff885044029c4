"""What tests of whole commands share: overrides for runs that take a second, and readers of what a run leaves."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from dppo_cli.cli.main import as_hydra_has_it, main
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import config_dir

TINY_RUN = (
    "model=hf",
    "hardware=cpu",
    "batch=small",
    "batch.prompts_per_step=2",
    "batch.samples_per_prompt=4",
    "batch.prompts_per_update=1",
    "optim=adamw_small",
    "optim.warmup_updates=0",
    "adapter.r=4",
    "adapter.alpha=8",
    "data.eval_problems=4",
    "sampling.max_new_tokens=4",
    "steps=2",
)
"""`dppo train` in a second, with the folder of a tiny model as `model.path`. A test's own overrides come after."""

REWARDS = """\
def late(prompts, completions, **columns):
    '''Mean place in the alphabet, so to say: two answers of a random model seldom get the same.'''
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(ord(c) % 16 for c in text) / (15 * max(1, len(text))) for text in texts]


def even(prompts, completions, **columns):
    '''Share of even digits: next to nothing for a random model, and soon learnt.'''
    return [sum(c in "02468" for c in text) / max(1, len(text)) for text in completions]


def broken(prompts, completions, **columns):
    raise ValueError("no idea")
"""


def write_rewards(folder: Path) -> None:
    """rewards.py, for `reward.path=rewards.py:late`."""
    (folder / "rewards.py").write_text(REWARDS, encoding="utf-8")


def train(model: Path, *overrides: str) -> int:
    """`dppo train` on a tiny model with a reward of `rewards.py` in the working folder; its exit status."""
    return main(["train", *train_words(model, *overrides)])


def train_words(model: Path, *overrides: str) -> list[str]:
    data = [] if "data=file" in overrides else ["data.train_problems=32"]
    return [*TINY_RUN, *data, f"model.path={model}", "reward=function", "reward.path=rewards.py:late", *overrides]


@cache
def composed(command: str, *overrides: str) -> DictConfig:
    """What Hydra makes of `dppo <command> <overrides>`; shared, so never changed."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        node = compose(command, list(overrides))
    OmegaConf.set_readonly(node, True)
    return node


def built_of(*words: str) -> TrainConfig:
    """What `dppo train <words>` builds."""
    node = composed("train", *(as_hydra_has_it("train", word) for word in words))
    return build(TrainConfig, OmegaConf.create(OmegaConf.to_container(node)))


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """A JSON-lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
