"""Top-K and exact divergence against binary: seconds of a step, and peak memory of a run.

    python benchmarks/approx.py

The step is that of step.py at 64 new tokens, sampling and update. Time: the three approximations alternate in one
process, on the same prompts and with the same seeds, so that each step is compared with the same work done at about the
same time. Three of the eight prompts have samples of different rewards; the other five have no advantage, about as many
as in step.py. Memory: one process each.
"""

import statistics
import time
from collections.abc import Sequence
from typing import Any

from hydra import compose, initialize_config_dir
from measure import Spread, save
from step import ours, work

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build
from dppo_cli.config.conf_tree import config_dir
from dppo_cli.policy.loading import load_policy
from dppo_cli.rollout.collect import advantages
from dppo_cli.rollout.engine import in_order
from dppo_cli.types import Completion, Group, Prompt, Score

NAMES = ("binary", "topk", "full")
PROMPTS = SAMPLES = 8
USEFUL = 3
"""Prompts whose samples have an advantage."""


def config(approx: str) -> TrainConfig:
    """The benchmark's run with one approximation. Its learning rate is next to zero, so that all steps are alike."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return build(TrainConfig, compose("train", [*work(64, f"approx={approx}"), "optim.lr=1e-12"]))


def seconds(rounds: int) -> dict[str, list[dict[str, float]]]:
    """For each approximation, seconds by phase of each round. The first round is a warm-up and is left out."""
    configs = {name: config(name) for name in NAMES}
    plain = configs["binary"]
    policy = load_policy(plain.model, plain.hardware, warn=print, adapter=plain.adapter, seed=1)
    prompts = policy.encode(plain.data.load(print).train[:PROMPTS], plain.prompt)
    learners = {name: make_learner(policy, configs[name]) for name in NAMES}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    with plain.rollout.load(policy, print) as engine:
        engine.sync(version=0)
        for turn in range(1 + rounds):
            for name in NAMES:
                start = time.perf_counter()
                num_logprobs = configs[name].approx.num_logprobs
                completions = in_order(engine.generate(prompts, SAMPLES, plain.sampling, num_logprobs, seed=turn))
                sampled = time.perf_counter()
                learners[name].update(scored(prompts, completions, configs[name]))
                end = time.perf_counter()
                if turn:
                    found[name].append({"rollout": sampled - start, "update": end - sampled, "step": end - start})
    return found


def scored(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], config: TrainConfig) -> list[Group]:
    """Groups in which every other sample of the first `USEFUL` prompts is right, and no other sample."""
    groups = []
    for i, (prompt, row) in enumerate(zip(prompts, completions, strict=True)):
        scores = [Score(float(n % 2) if i < USEFUL else 0.0) for n in range(len(row))]
        groups.append(Group(prompt, row, scores, advantages(scores, config.advantage)))
    return groups


def ratio(rows: list[dict[str, float]], binary: list[dict[str, float]], phase: str) -> Spread:
    return Spread.of([a[phase] / b[phase] for a, b in zip(rows, binary, strict=True)])


def main(rounds: int = 7) -> None:
    found: dict[str, Any] = {}
    memory = {name: ours(64, 3, f"approx={name}")[1].peak_gib for name in NAMES}
    rows = seconds(rounds)
    for name in NAMES:
        found[name] = {
            "seconds": statistics.median(row["step"] for row in rows[name]),
            "ratio": ratio(rows[name], rows["binary"], "step"),
            "rollout_ratio": ratio(rows[name], rows["binary"], "rollout"),
            "update_ratio": ratio(rows[name], rows["binary"], "update"),
            "gib": memory[name],
            "memory_ratio": memory[name] / memory["binary"],
        }
        print(name, found[name], flush=True)
    save("approx", found)


if __name__ == "__main__":
    main()
