"""Every recipe composes and builds; the stability recipe's picture and table say what the runs say."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import config_dir, recipes_dir

RECIPES = sorted(p.parent.name for p in recipes_dir().glob("*/recipe.yaml"))
METHODS = sorted(p.stem for p in (recipes_dir() / "stability/method").glob("*.yaml"))


def recipe(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        searchpath = f"hydra.searchpath=[file://{recipes_dir().parent}]"
        node = compose("train", [searchpath, f"+recipes/{name}=recipe", *overrides])
    with open_dict(node):
        node.pop("recipes", None)
    return node


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("stability_plot", recipes_dir() / "stability/plot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_builds_and_has_a_readme(name: str) -> None:
    assert isinstance(build(TrainConfig, recipe(name)), TrainConfig)
    assert f"recipe={name}" in (recipes_dir() / name / "README.md").read_text(encoding="utf-8")


def test_the_methods_of_the_stability_recipe_are_the_nine_it_names(plot: ModuleType) -> None:
    nodes = {m: recipe("stability", f"+recipes/stability/method={m}") for m in METHODS}
    assert sorted(plot.label(node) for node in nodes.values()) == sorted(plot.METHODS)
    built = {m: build(TrainConfig, node) for m, node in nodes.items()}
    assert {m for m, c in built.items() if c.anchor == "recompute"} == {"minirl", "dppo_tv_recompute"}
    assert {c.rollout.dtype for c in built.values()} == {"bfloat16"}  # type: ignore[attr-defined]
    assert {c.batch.updates_per_step for c in built.values()} == {16}


def test_the_picture_and_table_of_a_sweep(tmp_path: Path, plot: ModuleType) -> None:
    for job, (method, seed, reward) in enumerate([("dppo_tv", 1, 0.5), ("dppo_tv", 2, 0.7), ("cispo", 1, 0.1)]):
        folder = tmp_path / str(job)
        folder.mkdir()
        node = recipe("stability", f"+recipes/stability/method={method}", f"seed={seed}")
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(node))
        (folder / "summary.json").write_text(json.dumps({"eval_after": reward}))
        rows = [{"reward": reward * k, "shift_mean": 0.01 * k} for k in (2, 1)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = plot.read(tmp_path)
    assert {method: len(seeds) for method, seeds in runs.items()} == {"dppo-tv": 2, "cispo": 1}
    first = plot.table(runs).splitlines()[2]
    assert first == (
        "| dppo-tv | 2 | 60.0% (50.0% to 70.0%) | 1.200 (1.000 to 1.400) | 0.600 (0.500 to 0.700) "
        "| 0.0100 (0.0100 to 0.0100) |"
    )
    plot.draw(runs, tmp_path / "stability.png")
    assert (tmp_path / "stability.png").stat().st_size > 10_000
