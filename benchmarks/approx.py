"""Top-K and exact divergence against binary: seconds of a step, and peak memory of a run.

    python benchmarks/approx.py

The step of step.py at 64 new tokens, sampling and update. Seconds: the three in turn in one process, on the same
prompts and with the same seeds, so that each step is compared with the same work done at the same time; of three of the
eight prompts every other sample is right, which leaves five without advantage, about as many as in step.py. Memory: a
process each.
"""

import statistics
import time
from typing import Any

from hydra import compose, initialize_config_dir
from measure import Spread, save
from step import ours, work

from dppo_cli.conf_tree import config_dir
from dppo_cli.config import TrainConfig, build
from dppo_cli.learner import Learner
from dppo_cli.policy.loading import load_policy
from dppo_cli.train import score

NAMES = ("binary", "topk", "full")
USEFUL = 3


def config(approx: str) -> TrainConfig:
    """The benchmark's run with one approximation, its learning rate next to zero: every step is to be the same."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return build(TrainConfig, compose("train", [*work(64, f"approx={approx}"), "optim.lr=1e-12"]))


def seconds(rounds: int) -> dict[str, list[dict[str, float]]]:
    """Of each approximation, a dict of phase -> seconds per round; the first round is a warm-up and is left out."""
    configs = {name: config(name) for name in NAMES}
    plain = configs["binary"]
    policy = load_policy(plain.model.path, None, plain.hardware, new_adapter=plain.adapter, seed=1)
    prompts = policy.encode(plain.data.load().train[:8], plain.prompt)
    engine = plain.rollout.load(policy)
    learners = {name: Learner(policy, configs[name]) for name in NAMES}
    rewards = [float(i % 2) if i < USEFUL * 8 else 0.0 for i in range(64)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
    for turn in range(1 + rounds):
        for name in NAMES:
            start = time.perf_counter()
            num_logprobs = configs[name].approx.num_logprobs
            completions = engine.generate(prompts, 8, plain.sampling, num_logprobs, seed=turn)
            sampled = time.perf_counter()
            learners[name].update(score(completions, rewards, configs[name]))
            end = time.perf_counter()
            if turn:
                found[name].append({"rollout": sampled - start, "update": end - sampled, "step": end - start})
    return found


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
