"""A run that was stopped and goes on from a snapshot equals an undisturbed one."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from helpers import read_lines
from safetensors.torch import load, save

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.commands.train import make_learner, train
from dppo_cli.errors import RunError
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.collect import InStepCollector
from dppo_cli.telemetry.listeners import Listeners
from dppo_cli.telemetry.trust_region import MaskedTokens
from dppo_cli.telemetry.watch import GROWTH, Watch
from dppo_cli.training.evaluation import compared
from dppo_cli.training.metrics import COST
from dppo_cli.training.order import Shuffled
from dppo_cli.training.run_folder import RunFolder
from dppo_cli.training.samples import StepSamples
from dppo_cli.training.state import RunState, Snapshot
from dppo_cli.training.stopping import Stopping
from dppo_cli.types import Completion, Prompt, Score

pytestmark = pytest.mark.usefixtures("work")

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
OTHERS = (None, True, -1, 0, 10**30, 0.5, math.nan, math.inf, "x", "1", [], [None, 1], {"a": 1})
"""Values to put into a state."""


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


def as_bytes(snapshot: Snapshot) -> tuple[bytes, str]:
    return save(snapshot.tensors), json.dumps(snapshot.plain)


def assert_same(found: Run, expected: Run) -> None:
    """In every bit of the adapter, every tally and every text."""
    parameters = dict(expected.policy.model.named_parameters())
    for name, parameter in found.policy.model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name
    assert found.masked.tallies == expected.masked.tallies
    assert found.masked.rows(1000) == expected.masked.rows(1000)
    assert found.watch.state() == expected.watch.state()
    assert found.state.warnings == expected.state.warnings
    assert found.state.before == expected.state.before
    # And what no later step has shown yet: the optimizer's moments, the schedule, random numbers, the data cursor.
    assert as_bytes(found.state.snapshot()) == as_bytes(expected.state.snapshot())


def test_a_resumed_run_equals_an_undisturbed_one(train_config, tmp_path):
    config = train_config(*CHOSEN)
    undisturbed = new_run(config)
    undisturbed.state.before = {"held_out": MEASURED}
    metrics = go_on(undisturbed, 4, tmp_path / "undisturbed")

    stopped = new_run(config)
    stopped.state.before = {"held_out": MEASURED}
    first = go_on(stopped, 2, tmp_path / "stopped")
    saved = through_files(stopped.state.snapshot())

    resumed = new_run(config)
    resumed.state.load(saved)
    rest = go_on(resumed, 4, tmp_path / "resumed")

    assert [row["step"] for row in first + rest] == [1, 2, 3, 4]
    assert json.dumps(first + rest) == json.dumps(metrics), "as text, which is to say in every bit"
    assert_same(resumed, undisturbed)
    # The run was one in which all of this could have gone wrong.
    assert all(row["masked_positive"] + row["masked_negative"] > 0 and row["gradient_norm"] > 0 for row in metrics)
    assert len({row["lr"] for row in metrics}) == 4
    assert len(undisturbed.masked.tallies) > 10
    assert stopped.state.warnings
    assert rest[0]["mismatch_mean"] > GROWTH * first[0]["mismatch_mean"], "warned of in step 2, and not again"


def test_later_steps_do_not_change_a_snapshot_nor_a_snapshot_later_steps(train_config, tmp_path):
    config = train_config(*CHOSEN)
    undisturbed = new_run(config)
    metrics = go_on(undisturbed, 4, tmp_path / "undisturbed")

    observed = new_run(config)
    first = go_on(observed, 2, tmp_path / "first")
    snapshot = observed.state.snapshot()
    written = as_bytes(snapshot)
    rest = go_on(observed, 4, tmp_path / "rest")
    assert as_bytes(snapshot) == written
    assert as_bytes(observed.state.snapshot()) != written
    assert first + rest == metrics
    assert_same(observed, undisturbed)
    observed.state.warnings.append("of something else")
    assert as_bytes(snapshot) == written


def test_a_snapshot_before_the_first_step_is_the_start(train_config, tmp_path):
    """The optimizer has no moments yet."""
    config = replace(train_config(*CHOSEN), steps=1)
    undisturbed = new_run(config)
    saved = through_files(undisturbed.state.snapshot())
    metrics = go_on(undisturbed, 1, tmp_path / "undisturbed")
    resumed = new_run(config)
    resumed.state.load(saved)
    assert go_on(resumed, 1, tmp_path / "resumed") == metrics
    assert_same(resumed, undisturbed)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("before", math.nan),
        ("before", {"held_out": 1.0}),
        ("before", {"held_out": {"accuracy": 0.5}}),
        ("fingerprint", ["4624224b588a6e52"]),
        ("best", [1]),
        ("best", [1, "x"]),
        ("best", [math.inf, 0.5]),
        ("best", [1, math.nan]),
        ("seconds", None),
        ("seconds", math.nan),
        ("seconds", -1),
        ("seconds", 1e10),
        ("warnings", 3),
        ("step", -1),
        ("step", True),
        ("prompts", {"taken": 1}),
    ],
)
def test_what_no_run_has_written_is_refused(key, value, train_config):
    """At once, not when a summary is made of it at the end."""
    run = new_run(train_config(*CHOSEN))
    snapshot = run.state.snapshot()
    with pytest.raises(RunError, match=r"the checkpoint of step \S+ is of another run"):
        run.state.load(replace(snapshot, plain={**snapshot.plain, key: value}))
    run.state.load(snapshot)


def places(node: Any, above: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], tuple[Any, ...]]:
    """The keys that lead to each value; of values in lists, the first of each kind."""
    found: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    for key, child in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        for where in ((*above, key), *places(child, (*above, key)).values()):
            found.setdefault(tuple("#" if isinstance(part, int) and part > 1 else part for part in where), where)
    return found


def test_whatever_is_in_a_state_it_is_refused_or_can_be_gone_on_from(train_config, tmp_path):
    """Not that it fails, after hours, when tables are made of it."""
    config = train_config(*CHOSEN)
    run = new_run(config)
    run.state.before = {"held_out": MEASURED}
    go_on(run, 1, tmp_path / "run")
    saved = through_files(run.state.snapshot())
    refused, told = 0, set()
    for where in places(saved.plain).values():
        for value in OTHERS:
            plain = json.loads(json.dumps(saved.plain))
            at = plain
            for key in where[:-1]:
                at = at[key]
            at[where[-1]] = value
            try:
                run.state.load(Snapshot(saved.tensors, plain))
            except RunError:
                refused += 1
                continue
            told.add(where[0])
            json.dumps(run.state.snapshot().plain, allow_nan=False)
            json.dumps([run.masked.rows(20), run.masked.by_mu.rows()], allow_nan=False)
            compared(run.state.before, run.state.before)
            assert run.state.prompts.state()["taken"] <= 2
    assert refused > 300 and told >= {"seconds", "best", "before", "fingerprint", "tallies"}
    run.state.load(saved)
    go_on(run, 2, tmp_path / "rest")


@pytest.mark.parametrize("change", [lambda t: t.to(torch.complex64), lambda t: t + math.inf, lambda t: t * math.nan])
@pytest.mark.parametrize("kind", ["adapter.", "optimizer.exp_avg."])
def test_a_tensor_that_no_run_has_is_refused(kind, change, train_config, tmp_path):
    """Torch would take the real part of a complex one, and warn; one that is not finite would end the run."""
    run = new_run(train_config(*CHOSEN))
    go_on(run, 1, tmp_path / "run")
    snapshot = run.state.snapshot()
    name = next(name for name in snapshot.tensors if name.startswith(kind))
    tensors = {**snapshot.tensors, name: change(snapshot.tensors[name])}
    with pytest.raises(
        RunError, match=f"the checkpoint of step 1 is of another run: .*{name} is complex or not finite"
    ):
        run.state.load(replace(snapshot, tensors=tensors))


PROMPTS = [make.prompt(i) for i in range(7)]


@pytest.mark.parametrize("taken", [0, 1, 3, 6, 7, 8, 13, 14, 15, 21, 70, 100])
def test_the_order_of_prompts_goes_on_where_it_stopped(taken):
    """Multiples of the number of prompts end a round; `taken` may lie many rounds on."""
    order = Shuffled(PROMPTS, seed=4)
    for _ in range(taken // 5):
        order.take(5)
    order.take(taken % 5)
    resumed = Shuffled(PROMPTS, seed=4)
    resumed.load_state({"taken": taken})
    assert resumed.taken == order.taken == taken
    for size in (2, 7, 1, 30):
        assert resumed.take(size) == order.take(size)
    assert resumed.taken == order.taken == taken + 40
