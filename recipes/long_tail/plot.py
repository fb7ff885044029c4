"""Table and figures of this recipe's sweep.

    python recipes/long_tail/plot.py runs/long_tail        # pip install matplotlib

Writes long_tail.png (curves), masked_by_mu.png (reward and what was masked) and table.md into the sweep's folder. Jobs
that failed or have not ended are left out, and counted.
"""

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

import dppo_cli

POINTS = ("lr1e-3_2", "lr3e-4_16", "lr1e-3_16", "lr1e-3_64", "lr3e-3_16", "four_bit")
METHODS = {
    "ppo": "tab:red",
    "ppo_wide": "tab:orange",
    "clip_higher": "tab:pink",
    "cispo": "tab:olive",
    "pg_is": "0.35",
    "dppo_tv": "tab:blue",
    "dppo_kl": "tab:cyan",
    "dppo_tv_topk": "tab:green",
    "dppo_tv_full": "tab:purple",
}
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t, 97.5%, for 1 to 9 degrees of freedom."""

SHOWN = ("ppo", "ppo_wide", "dppo_tv", "dppo_kl", "dppo_tv_full")

Runs = dict[tuple[str, str], dict[int, "Finished"]]


@dataclass(frozen=True)
class Finished:
    """One run: a value for each rollout, NaN where it has none, and masked_by_mu.json."""

    curves: Mapping[str, np.ndarray[Any, Any]]
    by_mu: Sequence[dict[str, Any]]


def read(sweep: Path) -> tuple[Runs, int]:
    """By point and method the runs of each seed; how many are missing."""
    runs: Runs = {}
    missing = 0
    for job in dppo_cli.open_sweep(sweep):
        if job.overrides is None or job.run is None or job.run.summary is None:
            missing += 1
            continue
        chosen = dict(word.split("=", 1) for word in job.overrides if "=" in word)
        key = chosen["recipes/long_tail/point"], chosen["recipes/method"]
        names = ("reward", "shift_mean", "entropy", "masked_positive", "masked_negative")
        curves = {n: np.array([np.nan if r[n] is None else r[n] for r in job.run.metrics], float) for n in names}
        runs.setdefault(key, {})[int(chosen["seed"])] = Finished(curves, job.run.masked_by_mu or [])
    return runs, missing


def stacked(seeds: Iterable[Finished], name: str) -> np.ndarray[Any, Any]:
    """[seeds, rollouts]"""
    return np.array([run.curves[name] for run in seeds])


def draw_curves(runs: Runs, out: Path) -> None:
    points = [p for p in POINTS if any(point == p for point, _ in runs)]
    rows = (("reward", "reward"), ("shift_mean", "mean |pi-mu|"), ("entropy", "entropy (nats)"))
    figure, axes = plt.subplots(3, len(points), figsize=(3.1 * len(points), 7.2), sharex="col", squeeze=False)
    for column, point in enumerate(points):
        for row, (name, title) in enumerate(rows):
            axis = axes[row, column]
            for method, colour in METHODS.items():
                if (point, method) not in runs:
                    continue
                values = stacked(runs[point, method].values(), name)
                x = np.arange(1, values.shape[1] + 1)
                shown = np.ma.masked_invalid(values)  # a rollout in which nothing was trained has no |pi-mu|
                main = method in ("ppo", "dppo_tv")
                if main:
                    axis.fill_between(x, shown.min(0), shown.max(0), color=colour, alpha=0.15, lw=0)
                label = method if not column and not row else None
                axis.plot(x, shown.mean(0), color=colour, lw=2 if main else 0.9, label=label)
            axis.spines[["top", "right"]].set_visible(False)
            if not row:
                axis.set_title(point, fontsize=10)
            if not column:
                axis.set_ylabel(title)
        axes[-1, column].set_xlabel("rollout")
    figure.legend(loc="lower center", ncol=len(METHODS), frameon=False, fontsize=9)
    figure.suptitle("Mean over seeds; bands from the lowest to the highest seed for ppo and dppo_tv", fontsize=10)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(out, dpi=100)
    plt.close(figure)


def masked_shares(seeds: Iterable[Finished], advantage: str) -> tuple[list[float], list[float], list[float]]:
    """Lower ends of decades of mu, share of their tokens that was masked, mean |pi-mu| of those masked; all seeds."""
    sums: dict[float, list[float]] = {}
    for run in seeds:
        for row in run.by_mu:
            if row["advantage"] == advantage:
                total = sums.setdefault(row["mu_from"], [0.0, 0.0, 0.0])
                total[0] += row["seen"]
                total[1] += row["masked"]
                total[2] += row["masked"] * (row["mean_shift_masked"] or 0.0)
    ends = sorted(sums)
    shares = [sums[e][1] / sums[e][0] for e in ends]
    shifts = [sums[e][2] / sums[e][1] if sums[e][1] else math.nan for e in ends]
    return ends, shares, shifts


def draw_reward_and_masked(runs: Runs, point: str, out: Path) -> None:
    methods = [m for m in SHOWN if (point, m) in runs]
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.6), width_ratios=(1.2, 1, 1))
    for method in methods:
        reward = stacked(runs[point, method].values(), "reward")
        x = np.arange(1, reward.shape[1] + 1)
        axes[0].fill_between(x, reward.min(0), reward.max(0), color=METHODS[method], alpha=0.12, lw=0)
        axes[0].plot(x, reward.mean(0), color=METHODS[method], label=method)
    axes[0].set_xlabel("rollout")
    axes[0].set_ylabel("reward")
    axes[0].spines[["top", "right"]].set_visible(False)
    axes[2].sharey(axes[1])
    for axis, advantage in zip(axes[1:], "+-", strict=True):
        for number, method in enumerate(methods):
            ends, shares, _ = masked_shares(runs[point, method].values(), advantage)
            decade = [math.log10(e) if e else -8.0 for e in ends]
            x = np.array(decade) + 0.1 + 0.8 * number / len(methods)
            axis.bar(x, shares, 0.8 / len(methods), align="edge", color=METHODS[method], label=method)
        axis.set_title(f"A {'>' if advantage == '+' else '<'} 0", fontsize=10)
        axis.set_xlabel("log10 mu")
        axis.spines[["top", "right"]].set_visible(False)
    axes[1].set_ylabel("share of tokens masked")
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(out, dpi=100)
    plt.close(figure)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95% interval by Student's t; NaN of one value."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, T_975[min(n - 1, len(T_975)) - 1] * math.sqrt(variance / n)


def mean_reward(run: Finished) -> float:
    return float(np.nanmean(run.curves["reward"]))


def early(run: Finished) -> float:
    """The mean reward of the first third of the rollouts."""
    reward = run.curves["reward"]
    return float(np.nanmean(reward[: max(1, len(reward) // 3)]))


def table(runs: Runs) -> str:
    """Markdown. Each cell is the mean over seeds (lowest to highest); the last two columns are paired by seed."""
    lines = [
        "| point | method | rollouts to a reward of 50% | best reward | last reward | last entropy "
        "| last mean \\|pi-mu\\| | early reward / PPO's, by seed | mean reward - PPO's (95%) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for point in POINTS:
        base = runs.get((point, "ppo"), {})
        for method in METHODS:
            seeds = runs.get((point, method))
            if not seeds:
                continue
            reward = stacked(seeds.values(), "reward")
            reached = [int(np.argmax(r >= 0.5)) + 1 if (r >= 0.5).any() else None for r in reward]
            to_half = [str(n) if n else "never" for n in reached]
            last = [_last(stacked(seeds.values(), n)) for n in ("entropy", "shift_mean")]
            both = sorted(seeds.keys() & base.keys()) if method != "ppo" else []
            ratios = [early(seeds[s]) / early(base[s]) for s in both]
            difference = ""
            if both:
                mean, half = interval([mean_reward(seeds[s]) - mean_reward(base[s]) for s in both])
                difference = f"{mean:+.3f} ± {half:.3f}"
            cells = [
                point,
                method,
                ", ".join(to_half),
                _cell(np.nanmax(reward, 1), ".3f"),
                _cell(_last(reward), ".3f"),
                _cell(last[0], ".2f"),
                _cell(last[1], ".4f"),
                ", ".join(f"{ratio:.2f}" for ratio in ratios),
                difference,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _last(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Of each seed the last number; steps in which nothing was trained have none."""
    return np.array([v[np.isfinite(v)][-1] if np.isfinite(v).any() else np.nan for v in values])


def _cell(values: np.ndarray[Any, Any], form: str) -> str:
    return f"{values.mean():{form}} ({values.min():{form}} to {values.max():{form}})"


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit("usage: python recipes/long_tail/plot.py SWEEP_FOLDER")
    sweep = Path(sys.argv[1])
    runs, missing = read(sweep)
    if not runs:
        sys.exit(f"{sweep} holds no finished runs")
    draw_curves(runs, sweep / "long_tail.png")
    point = "lr1e-3_16" if any(p == "lr1e-3_16" for p, _ in runs) else next(iter(runs))[0]
    draw_reward_and_masked(runs, point, sweep / "masked_by_mu.png")
    text = table(runs)
    for method in METHODS:
        for advantage in "+-":
            if (point, method) in runs:
                ends, shares, shifts = masked_shares(runs[point, method].values(), advantage)
                cells = [f"{s:.1%} at {d:.1e}" for s, d in zip(shares, shifts, strict=True)]
                text += f"\n{point} {method} A{advantage}: masked, and their mean |pi-mu|, by mu from {ends}: {cells}"
    (sweep / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if missing:
        print(f"{missing} jobs have not ended or failed, and are left out")


if __name__ == "__main__":
    main()
