"""What is no state that a run has written is refused before the run goes on, not when it ends."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from state_cases import CHOSEN, MEASURED, go_on, new_run, through_files

from dppo_cli.errors import RunError
from dppo_cli.training.evaluation import compared
from dppo_cli.training.state import Snapshot

pytestmark = pytest.mark.usefixtures("work")

OTHERS = (None, True, -1, 0, 10**30, 0.5, math.nan, math.inf, "x", "1", [], [None, 1], {"a": 1})
"""Values to put into a state."""


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
