"""What tests of a run's state share: runs in this process that remember whatever there is to remember."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import make
from helpers import read_lines
from safetensors.torch import load, save

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.commands.train import train
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.collect import InStepCollector
from dppo_cli.telemetry.listeners import Listeners
from dppo_cli.telemetry.trust_region import MaskedTokens
from dppo_cli.telemetry.watch import Watch
from dppo_cli.training.metrics import COST
from dppo_cli.training.order import Shuffled
from dppo_cli.training.run_folder import RunFolder
from dppo_cli.training.samples import StepSamples
from dppo_cli.training.state import RunState, Snapshot
from dppo_cli.training.stopping import Stopping
from dppo_cli.types import Completion, Prompt, Score

# Whatever a run can remember matters here: random numbers in an update, the schedule, the order of mini-batches.
CHOSEN = (
    "steps=4",
    "adapter.dropout=0.1",
    "optim.lr=0.01",
    "optim.schedule=cosine",
    "batch.epochs=2",
    "batch.prompts_per_update=1",
    "batch.samples_per_prompt=4",
    "anchor=recompute",
    "divergence.delta_low=0.02",
    "divergence.delta_high=0.02",
)


MEASURED = {
    "problems": 3,
    "samples": 3,
    "accuracy": 0.25,
    "standard_error": None,
    "interval": [0.0, 0.5],
    "pass_at": {"1": 0.25},
    "majority_at": {"1": None},
    "rates": [0.0, None, 0.5],
    "fingerprint": "4624224b588a6e52",
}


@dataclass
class Run:
    """What `dppo train` has made before the first step."""

    config: TrainConfig
    policy: Policy
    masked: MaskedTokens
    watch: Watch
    state: RunState


def new_run(config: TrainConfig) -> Run:
    policy = make.policy(config)
    # Five prompts, two a step: the snapshot comes in the middle of a round.
    prompts = make.prompts(policy, (*make.MIXED, "12+3="))
    masked = MaskedTokens(text_of=str)
    watch = Watch(config.objective.masks, lambda text: state.warnings.append(text))
    tallies = {"masked_tokens": masked, "watch": watch}
    state = RunState(make_learner(policy, config), Shuffled(prompts, config.seed), tallies)
    return Run(config, policy, masked, watch, state)


def score(prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]]) -> list[list[Score]]:
    """A reward by which two responses of a random model seldom are equal."""
    return [[Score(sum(ord(c) % 16 for c in one.text) / 16) for one in row] for row in completions]


def go_on(run: Run, until: int, folder: Path) -> list[dict[str, Any]]:
    """Take the steps up to `until` as `dppo train` does; the lines of metrics.jsonl, apart from the times."""
    config = replace(run.config, steps=until)
    engine = config.rollout.load(run.policy, make.fail)
    collector = InStepCollector(
        engine,
        score,
        config.advantage,
        config.batch,
        config.sampling,
        config.approx.num_logprobs,
        config.seed,
        mask_truncated=False,
    )
    listeners = Listeners([run.masked, run.watch])
    saved: list[int] = []
    with RunFolder(folder, "", run.policy.adapter_bytes) as opened, engine, Stopping(60.0, make.fail) as stopping:
        engine.sync(run.state.step)
        train(
            run.state,
            config,
            collector,
            engine,
            make.fail,
            lambda: saved.append(run.state.step),
            lambda: 0.0,
            opened,
            StepSamples(config.samples, until, str, make.fail),
            listeners,
            stopping,
        )
    assert saved == [], "checkpoint.every is more than these steps"
    assert len(listeners.listening) == 2, "no listener failed"
    rows = read_lines(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in COST} for row in rows]


def through_files(snapshot: Snapshot) -> Snapshot:
    """What is left of a snapshot after it was written and read."""
    return Snapshot(load(save(snapshot.tensors)), json.loads(json.dumps(snapshot.plain)))
