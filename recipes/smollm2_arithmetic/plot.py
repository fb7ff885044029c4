"""Draw the curves of runs of this recipe, or of recipes/smollm2_calculator, and print their table.

    python plot.py OUT.png RUN...        # pip install matplotlib

A run's label is what it changes of the recipe.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


def read(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """Config, metrics and summary."""
    config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return config, metrics, json.loads((run / "summary.json").read_text(encoding="utf-8"))


def label(config: dict[str, Any]) -> str:
    """LoRA or QLoRA, how many updates a rollout has, and whether there is a calculator."""
    batch = config["batch"]
    updates = batch["epochs"] * batch["prompts_per_step"] // batch["prompts_per_update"]
    kind = "LoRA" if config["adapter"]["quantization"] is None else "QLoRA"
    calculator = ", calculator" if "path" in config.get("environment", {}) else ""
    return f"{kind}{calculator}, seed {config['seed']}" + (f", {updates} updates a rollout" if updates > 1 else "")


def curve(
    config: dict[str, Any], metrics: Sequence[dict[str, Any]], summary: dict[str, Any]
) -> tuple[list[int], list[float]]:
    """Samples trained on, and held-out accuracy: before, in between and after."""
    a_step = config["batch"]["prompts_per_step"] * config["batch"]["samples_per_prompt"]
    between = [(row["step"] * a_step, row["eval_accuracy"]) for row in metrics if row.get("eval_accuracy") is not None]
    points = [(0, summary["eval_before"]), *between, (summary["steps"] * a_step, summary["eval_after"])]
    return [x for x, _ in points], [y for _, y in points]


def table(runs: Sequence[Path]) -> str:
    """A row for each run, in Markdown."""
    lines = ["| run | before | after (95% interval) | difference (95% interval) | seconds | peak memory |"]
    lines.append("|---|---|---|---|---|---|")
    for run in runs:
        config, _, summary = read(run)
        found = summary["evaluations"]["held_out"]
        after, difference = found["after"], found["difference"]
        cells = [
            label(config),
            f"{found['before']['accuracy']:.0%}",
            f"{after['accuracy']:.0%} ({after['interval'][0]:.0%} to {after['interval'][1]:.0%})",
            f"{difference['mean']:+.0%} ({difference['interval'][0]:+.0%} to {difference['interval'][1]:+.0%})",
            f"{summary['seconds']:.0f}",
            f"{summary['peak_memory_gib']:.1f} GiB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: Sequence[Path], path: Path) -> None:
    """Held-out accuracy against the samples trained on."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for run in runs:
        config, metrics, summary = read(run)
        axes.plot(*curve(config, metrics, summary), marker="o", markersize=3, label=label(config))
    axes.set(xlabel="samples trained on", ylabel="accuracy on held-out problems", ylim=(0, 1))
    axes.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    out, *given = [Path(word) for word in sys.argv[1:]]
    print(table(given))
    draw(given, out)
