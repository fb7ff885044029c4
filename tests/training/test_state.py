"""A run that was stopped and goes on from a snapshot equals an undisturbed one."""

import json
from dataclasses import replace

import make
import pytest
import torch
from safetensors.torch import save
from state_cases import CHOSEN, MEASURED, Run, go_on, new_run, through_files

from dppo_cli.telemetry.watch import GROWTH
from dppo_cli.training.order import Shuffled
from dppo_cli.training.state import Snapshot

pytestmark = pytest.mark.usefixtures("work")


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
