"""The long-tail recipe: what it sweeps over, and that its table and pictures say what the runs say."""

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from dppo_cli.cli.main import main
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import config_dir, recipes_dir

FOLDER = recipes_dir() / "long_tail"


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_tail_plot", FOLDER / "plot.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def job(sweep: Path, number: int, point: str, method: str, seed: int, rewards: list[float | None]) -> None:
    """A finished job of the sweep."""
    folder = sweep / str(number)
    folder.mkdir(parents=True)
    overrides = [f"recipes/long_tail/point={point}", f"recipes/method={method}", f"seed={seed}"]
    record = {"number": number, "overrides": overrides, "status": 0, "error": None, "summary": {}}
    (folder / "job.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text("steps: 3\n")
    (folder / "summary.json").write_text("{}")
    rows = [
        {"step": n, "reward": r, "shift_mean": 0.01 * n, "entropy": 3.0 - n, "masked_positive": 0, "masked_negative": 0}
        for n, r in enumerate(rewards, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    row = {"mu_from": 0.001, "seen": 100, "mean_shift": 1e-4, "mean_shift_masked": 2e-4}
    by_mu = [{**row, "advantage": "+", "masked": 10}, {**row, "advantage": "-", "masked": 0, "mean_shift_masked": None}]
    (folder / "masked_by_mu.json").write_text(json.dumps(by_mu))


def test_it_sweeps_over_the_points_and_methods_that_are_drawn(plot: ModuleType) -> None:
    params = OmegaConf.load(FOLDER / "recipe.yaml").hydra.sweeper.params
    points, methods = (str(params[key]).split(",") for key in ("+recipes/long_tail/point", "+recipes/method"))
    assert points == list(plot.POINTS) and sorted(points) == sorted(p.stem for p in FOLDER.glob("point/*.yaml"))
    assert methods == list(plot.METHODS)
    updates, targets = {}, set()
    for point in points:
        for method in methods:
            with initialize_config_dir(str(config_dir()), version_base="1.3"):
                words = ["+recipes/long_tail=recipe", f"+recipes/long_tail/point={point}", f"+recipes/method={method}"]
                node = compose("train", [f"hydra.searchpath=[file://{recipes_dir().parent}]", *words])
            with open_dict(node):
                node.pop("recipes", None)
            config = build(TrainConfig, node)
            updates[point] = config.batch.updates_per_step
            targets.add(repr((config.objective, config.divergence, config.approx)))
    assert updates == {
        "lr1e-3_2": 2,
        "lr3e-4_16": 16,
        "lr1e-3_16": 16,
        "lr1e-3_64": 64,
        "lr3e-3_16": 16,
        "four_bit": 16,
    }
    assert len(targets) == 9


def test_table_and_pictures_of_a_sweep(tmp_path: Path, plot: ModuleType) -> None:
    for number, (method, seed, rewards) in enumerate(
        [
            ("ppo", 4, [0.1, 0.2, 0.6]),
            ("ppo", 5, [0.1, 0.2, 0.3]),
            ("dppo_tv", 4, [0.2, 0.6, None]),
            ("dppo_tv", 5, [0.2, 0.4, 0.6]),
        ]
    ):
        job(tmp_path, number, "lr1e-3_16", method, seed, rewards)
    (tmp_path / "4").mkdir()
    (tmp_path / "4/job.json").write_text(json.dumps({"number": 4, "overrides": [], "status": 1, "error": "x"}))
    runs, missing = plot.read(tmp_path)
    assert missing == 1 and {key: sorted(seeds) for key, seeds in runs.items()} == {
        ("lr1e-3_16", "ppo"): [4, 5],
        ("lr1e-3_16", "dppo_tv"): [4, 5],
    }
    ppo, dppo = plot.table(runs).splitlines()[2:]
    assert ppo == (
        "| lr1e-3_16 | ppo | 3, never | 0.450 (0.300 to 0.600) | 0.450 (0.300 to 0.600) | 0.00 (0.00 to 0.00) "
        "| 0.0300 (0.0300 to 0.0300) |  |  |"
    )
    # The means are 0.4 and 0.4 against 0.3 and 0.2; t is 12.706 for one degree of freedom.
    half = 12.706 * math.sqrt(0.005 / 2)
    assert dppo.startswith("| lr1e-3_16 | dppo_tv | 2, 3 |") and dppo.endswith(f"| 2.00, 2.00 | +0.150 ± {half:.3f} |")
    assert plot.masked_shares(runs["lr1e-3_16", "ppo"].values(), "+") == ([0.001], [0.1], [pytest.approx(2e-4)])
    for draw, name in (
        (plot.draw_curves, "a.png"),
        (lambda r, out: plot.draw_reward_and_masked(r, "lr1e-3_16", out), "b.png"),
    ):
        draw(runs, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_small_sweep_runs_goes_on_and_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plot: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, one after the other: launchers have tests of their own."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "recipe=long_tail", "steps=2", "data.eval_problems=4", "batch.prompts_per_step=8", "seed=4"]
    words += ["hydra.launcher.n_jobs=1", "+recipes/long_tail/point=four_bit", "+recipes/method=ppo,dppo_tv_full"]
    words += ["run_dir=sweep", "hardware=cpu"]
    assert main(words) == 0
    first = (tmp_path / "sweep/0/summary.json").stat().st_mtime_ns
    assert main([*words, "resume=auto"]) == 0
    assert (tmp_path / "sweep/0/summary.json").stat().st_mtime_ns == first, "a finished job is not run again"
    rows = [json.loads(line) for line in (tmp_path / "sweep/0/metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and rows[0]["mismatch_mean"] > 1e-4, "the sampler's base has 4 bits"
    monkeypatch.setattr("sys.argv", ["plot.py", "sweep"])
    capsys.readouterr()
    plot.main()
    assert "| four_bit | dppo_tv_full | never |" in capsys.readouterr().out
    assert {p.name for p in (tmp_path / "sweep").glob("*.*")} >= {"long_tail.png", "masked_by_mu.png", "table.md"}
