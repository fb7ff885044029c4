"""Every recipe composes and builds; the stability recipe's picture and table say what the runs say."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf, open_dict

from dppo_cli.cli.main import main
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import config_dir, recipes_dir

GSM8K = Path(__file__).parents[2] / "shared/data/gsm8k_train.jsonl"
SANITY = GSM8K.with_name("math_sanity_1k5.jsonl")
RECIPES = sorted(p.parent.name for p in recipes_dir().glob("*/recipe.yaml"))


def recipe(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        searchpath = f"hydra.searchpath=[file://{recipes_dir().parent}]"
        node = compose("train", [searchpath, f"+recipes/{name}=recipe", *overrides])
    with open_dict(node):
        node.pop("recipes", None)
    return node


def swept(name: str, key: str) -> list[str]:
    """The values of a key that a recipe sweeps over."""
    node: Any = OmegaConf.load(recipes_dir() / name / "recipe.yaml")
    return str(node.hydra.sweeper.params[key]).split(",")


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
    nodes = {m: recipe("stability", f"+recipes/method={m}") for m in swept("stability", "+recipes/method")}
    assert sorted(plot.label(node) for node in nodes.values()) == sorted(plot.NINE)
    built = {m: build(TrainConfig, node) for m, node in nodes.items()}
    assert {m for m, c in built.items() if c.anchor == "recompute"} == {"minirl", "dppo_tv_recompute"}
    assert {c.rollout.dtype for c in built.values()} == {"bfloat16"}  # type: ignore[attr-defined]
    assert {c.batch.updates_per_step for c in built.values()} == {16}


def test_the_methods_of_the_filters_recipe_are_named_after_their_parts(plot: ModuleType) -> None:
    methods = swept("filters", "+recipes/method")
    nodes = {m: recipe("filters", f"+recipes/method={m}") for m in methods}
    assert {m: plot.label(node) for m, node in nodes.items()} == {
        m: "dppo-tv" if m == "dppo_tv" else m.removeprefix("dppo_") for m in methods
    }
    assert sorted(map(plot.label, nodes.values())) == sorted(["dppo-tv", *plot.PARTS.values()])
    assert {build(TrainConfig, node).batch.updates_per_step for node in nodes.values()} == {64}


def test_runs_from_before_there_were_filters_have_their_names(tmp_path: Path, plot: ModuleType) -> None:
    node = OmegaConf.create(OmegaConf.to_container(recipe("stability", "+recipes/method=ppo")))
    for key in ("region", "filter", "verdict"):
        del node[key]
    (tmp_path / "0").mkdir()
    (tmp_path / "0/config.yaml").write_text(OmegaConf.to_yaml(node))
    (tmp_path / "0/summary.json").write_text("{}")
    (tmp_path / "0/metrics.jsonl").write_text("{}\n")
    assert list(plot.read(tmp_path)) == ["ppo"]


def test_the_picture_and_table_of_a_sweep(tmp_path: Path, plot: ModuleType) -> None:
    for job, (method, seed, reward) in enumerate([("dppo_tv", 1, 0.5), ("dppo_tv", 2, 0.7), ("cispo", 1, 0.1)]):
        folder = tmp_path / str(job)
        folder.mkdir()
        node = recipe("stability", f"+recipes/method={method}", f"seed={seed}")
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


def test_a_rollout_that_taught_nothing_has_no_difference(plot: ModuleType) -> None:
    """The table has that of the last rollout which has one."""
    steps = [{"reward": 0.5, "shift_mean": 0.25}, {"reward": 0.0, "shift_mean": None}]
    row = plot.table({"ppo": [{"steps": steps, "summary": {"eval_after": 0.0}}]}).splitlines()[2]
    assert row.endswith("| 0.000 (0.000 to 0.000) | 0.2500 (0.2500 to 0.2500) |")


# On real problems


@pytest.mark.skipif(not GSM8K.is_file(), reason="there is no gsm8k_train.jsonl beside the checkout")
@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("gsm8k_")])
def test_a_gsm8k_recipe_trains_a_tiny_model_on_real_rows(
    name: str, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but the model, the data's place and sizes."""
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    # What the tiny models' 256 positions hold, a token for each character.
    short = sorted(rows, key=lambda row: len(row["question"]))[:40]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    data = ["data=file", "data.path=train.jsonl", "data.eval_problems=2", "data.prompt_column=question"]
    data += ["data.answer_column=answer", "data.answer_pattern='####\\s*(.+)'"]
    small = ["steps=1", "batch.prompts_per_step=2", "batch.prompts_per_update=1", "sampling.max_new_tokens=8"]
    words = [f"recipe={name}", f"model.path={tiny_models['llama3']}", *data, *small, "prompt.too_long=drop"]
    assert main(["train", *words, "hardware=cpu", "run_dir=run"]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert row["reward"] < 0.2 and row["unjudged"] == 0.0, "a random model, and every response is judged"
    assert row["sampling_rounds"] == 3 and row["sampled_groups"] in (4, 5, 6)


@pytest.mark.skipif(not SANITY.is_file(), reason="there is no math_sanity_1k5.jsonl beside the checkout")
def test_the_sanity_recipe_trains_a_tiny_model_on_real_rows(
    tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it but the model, the data's place and sizes; accuracy is measured on what is trained on."""
    monkeypatch.chdir(tmp_path)
    rows = [json.loads(line) for line in SANITY.read_text(encoding="utf-8").splitlines()]
    short = sorted(rows, key=lambda row: len(row["problem"]))[:8]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in short))
    data = ["data=file", "data.path=train.jsonl", "data.eval_path=train.jsonl", "data.prompt_column=problem"]
    small = ["steps=1", "batch.prompts_per_step=4", "batch.prompts_per_update=2", "sampling.max_new_tokens=8"]
    name = "sanity_r1_distill_qwen_1_5b"
    words = [f"recipe={name}", f"model.path={tiny_models['qwen3']}", *data, *small, "hardware=cpu", "run_dir=run"]
    assert main(["train", *words]) == 0
    (row,) = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert row["reward"] < 0.2 and row["unjudged"] == 0.0, "a random model, and every response is judged"
    assert build(TrainConfig, recipe(name)).objective.ratio_cap is None  # type: ignore[attr-defined]


# A real model


@pytest.fixture(scope="module")
def curves() -> ModuleType:
    spec = importlib.util.spec_from_file_location("curves", recipes_dir() / "smollm2_arithmetic/plot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_curve_and_table_of_a_real_run(tmp_path: Path, curves: ModuleType) -> None:
    runs = []
    for number, words in enumerate((["seed=3"], ["adapter=qlora", "batch.prompts_per_step=32", "steps=2"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.yaml").write_text(OmegaConf.to_yaml(recipe("smollm2_arithmetic", *words)))
        rows = [{"step": 1, "eval_accuracy": 0.5}, {"step": 2}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        before = {"accuracy": 0.1, "interval": [0.05, 0.15]}
        after = {"accuracy": 0.75, "interval": [0.7, 0.8]}
        difference = {"mean": 0.65, "interval": [0.6, 0.7], "problems": 100}
        held_out = {"before": before, "after": after, "difference": difference}
        summary = {"eval_before": 0.1, "eval_after": 0.75, "steps": 2, "seconds": 61.0, "peak_memory_gib": 2.25}
        (folder / "summary.json").write_text(json.dumps({**summary, "evaluations": {"held_out": held_out}}))
        runs.append(folder)
    assert curves.curve(*curves.read(runs[1])) == ([0, 256, 512], [0.1, 0.5, 0.75])
    assert curves.table(runs).splitlines()[2:] == [
        "| LoRA, seed 3 | 10% | 75% (70% to 80%) | +65% (+60% to +70%) | 61 | 2.2 GiB |",
        "| QLoRA, seed 1, 4 updates a rollout | 10% | 75% (70% to 80%) | +65% (+60% to +70%) | 61 | 2.2 GiB |",
    ]
    curves.draw(runs, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_without_a_hub_is_not_fetched_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("fetch", recipes_dir() / "smollm2_arithmetic/fetch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: pytest.fail("it is there"))
    (tmp_path / "config.json").write_text("{}")
    module.fetch(tmp_path)
