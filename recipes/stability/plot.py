"""Table and figure of a sweep with recipe=stability or recipe=filters.

    python recipes/stability/plot.py runs/stability

Writes stability.png and stability.md into the sweep's folder: reward and mean |pi-mu| of each method, as the mean over
seeds with the range from the lowest to the highest seed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from dppo_cli.config.saved import read_config

NINE = ["dppo-tv", "dppo-kl", "dppo-tv topk", "ppo", "clip-higher", "cispo", "pg_is", "minirl", "dppo-tv recompute"]
"""Of recipe=stability."""
PARTS = {
    "PrefixBudget": "prefix_budget",
    "SequenceMean": "sequence_mean",
    "ratio token": "icepop",
    "two_way_kl token": "kpop",
    "ratio sequence_mean": "geometric",
    "k3 sequence_mean": "k3",
    "ratio sequence_mean, negative only": "opsm",
}
"""Regions and filters of recipe=filters, which stand beside dppo-tv."""
METHODS = [*NINE, *PARTS.values()]


def label(config: Any) -> str:
    """The method's name, from the run's config."""
    objective = config.objective["_target_"].rpartition(".")[2]
    if objective == "PolicyGradient":
        return "pg_is" if config.objective.ratio_cap is None else "cispo"
    if objective == "RatioClip":
        if config.anchor == "recompute":
            return "minirl"
        return "clip-higher" if config.objective.eps_high > config.objective.eps_low else "ppo"
    if (name := part(config)) is not None:
        return name
    divergence = "kl" if config.divergence["_target_"].endswith("KL") else "tv"
    topk = " topk" if config.approx["_target_"].endswith("TopK") else ""
    return f"dppo-{divergence}{topk}{' recompute' if config.anchor == 'recompute' else ''}"


def part(config: Any) -> str | None:
    """Its region or filter, if it has one besides DPPO's own."""
    kind, region = (config[name]["_target_"].rpartition(".")[2] for name in ("filter", "region"))
    if kind == "KeepAll":
        return PARTS.get(region)
    if kind != "Band":
        return kind
    band = f"{config.filter.statistic} {config.filter.scope}{', negative only' if config.filter.negative_only else ''}"
    return PARTS.get(band, band)


def read(sweep: Path) -> dict[str, list[dict[str, Any]]]:
    """For each method one entry per seed: the metrics of its steps, and its summary."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for summary in sorted(sweep.glob("*/summary.json")):
        folder = summary.parent
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        entry = {"steps": steps, "summary": json.loads(summary.read_text())}
        runs.setdefault(label(read_config(folder / "config.yaml")[0]), []).append(entry)
    return runs


def curves(runs: list[dict[str, Any]], key: str) -> np.ma.MaskedArray:
    """[seeds, steps]; masked where a step has no value, as when all samples of a rollout got the same reward."""
    return np.ma.masked_invalid(np.array([[step[key] for step in run["steps"]] for run in runs], dtype=float))


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    present = [method for method in METHODS if method in runs]
    size = (2.1 * len(present), 5.2)
    figure, axes = plt.subplots(2, len(present), figsize=size, sharex=True, sharey="row", squeeze=False)
    for column, method in enumerate(present):
        for row, (key, title) in enumerate([("reward", "reward"), ("shift_mean", "mean |pi-mu|")]):
            axis = axes[row, column]
            for other in present:
                axis.plot(curves(runs[other], key).mean(0), color="0.85", linewidth=0.8, zorder=1)
            values = curves(runs[method], key)
            x = np.arange(values.shape[1])
            axis.fill_between(x, values.min(0), values.max(0), color="tab:blue", alpha=0.25, linewidth=0, zorder=2)
            axis.plot(x, values.mean(0), color="tab:blue", linewidth=1.6, zorder=3)
            if row == 0:
                axis.set_title(method, fontsize=10)
            else:
                axis.set_xlabel("rollout")
            if column == 0:
                axis.set_ylabel(title)
            axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Mean over seeds, band from the lowest to the highest seed; grey: the other methods", fontsize=10)
    figure.tight_layout()
    figure.savefig(out, dpi=110)


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Markdown; every cell is mean (lowest to highest seed)."""

    def cell(values: Any, form: str) -> str:
        present = np.ma.compressed(np.ma.asarray(values))
        return f"{present.mean():{form}} ({present.min():{form}} to {present.max():{form}})"

    lines = [
        "| method | seeds | held-out accuracy after | best reward of a rollout | last reward | last mean \\|pi-mu\\| |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    for method in METHODS:
        if method not in runs:
            continue
        seeds = runs[method]
        rewards, shifts = curves(seeds, "reward"), curves(seeds, "shift_mean")
        after = [run["summary"]["eval_after"] for run in seeds]
        cells = [cell(after, ".1%"), cell(rewards.max(1), ".3f"), cell(rewards[:, -1], ".3f")]
        # A rollout without a single right answer teaches nothing, and nothing is measured on it.
        cells.append(cell([np.ma.compressed(seed)[-1] for seed in shifts], ".4f"))
        lines.append(f"| {method} | {len(seeds)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python recipes/stability/plot.py SWEEP_FOLDER")
    sweep = Path(sys.argv[1])
    runs = read(sweep)
    if not runs:
        sys.exit(f"{sweep} holds no finished runs")
    draw(runs, sweep / "stability.png")
    text = table(runs)
    (sweep / "stability.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
