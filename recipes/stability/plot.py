"""Table and figure of a stability sweep.

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
from omegaconf import OmegaConf

METHODS = ["dppo-tv", "dppo-kl", "dppo-tv topk", "ppo", "clip-higher", "cispo", "pg_is", "minirl", "dppo-tv recompute"]


def label(config: Any) -> str:
    """The method's name, from the run's config."""
    objective = config.objective["_target_"].rpartition(".")[2]
    if objective == "PolicyGradient":
        return "pg_is" if config.objective.ratio_cap is None else "cispo"
    if objective == "RatioClip":
        if config.anchor == "recompute":
            return "minirl"
        return "clip-higher" if config.objective.eps_high > config.objective.eps_low else "ppo"
    divergence = "kl" if config.divergence["_target_"].endswith("KL") else "tv"
    topk = " topk" if config.approx["_target_"].endswith("TopK") else ""
    return f"dppo-{divergence}{topk}{' recompute' if config.anchor == 'recompute' else ''}"


def read(sweep: Path) -> dict[str, list[dict[str, Any]]]:
    """For each method one entry per seed: the metrics of its steps, and its summary."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for summary in sorted(sweep.glob("*/summary.json")):
        folder = summary.parent
        steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        entry = {"steps": steps, "summary": json.loads(summary.read_text())}
        runs.setdefault(label(OmegaConf.load(folder / "config.yaml")), []).append(entry)
    return runs


def curves(runs: list[dict[str, Any]], key: str) -> np.ma.MaskedArray:
    """[seeds, steps]; masked where a step has no value, as when all samples of a rollout got the same reward."""
    return np.ma.masked_invalid(np.array([[step[key] for step in run["steps"]] for run in runs], dtype=float))


def draw(runs: dict[str, list[dict[str, Any]]], out: Path) -> None:
    figure, axes = plt.subplots(2, len(METHODS), figsize=(2.1 * len(METHODS), 5.2), sharex=True, sharey="row")
    for column, method in enumerate(METHODS):
        for row, (key, title) in enumerate([("reward", "reward"), ("shift_mean", "mean |pi-mu|")]):
            axis = axes[row, column]
            for other in METHODS:
                if other in runs:
                    axis.plot(curves(runs[other], key).mean(0), color="0.85", linewidth=0.8, zorder=1)
            if method in runs:
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
