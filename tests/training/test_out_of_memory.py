"""An update for which memory does not suffice: repeated with half the budget, as if that had been the budget before."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from updates import assert_identical, off_policy, parameters, with_budget

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.policy.forward import Forward, SharedPrompts, WholeSequences
from dppo_cli.policy.head import _TokenLogProbs
from dppo_cli.policy.packed_forward import PackedGroups
from dppo_cli.training.learner import Learner
from dppo_cli.types import Group

ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
ON_CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
BUDGET = 32
PARTS: dict[str, tuple[Any, str]] = {
    "prompts": (SharedPrompts, "_run"),
    "forward": (SharedPrompts, "predicting_states"),
    "backward": (_TokenLogProbs, "backward"),
    "backward of prompts": (SharedPrompts, "backward"),
}


class Memory:
    """Runs out in some calls of a function, counted from 1."""

    def __init__(self, patch: pytest.MonkeyPatch, part: str, calls: Sequence[int], error: Exception = ON_GPU) -> None:
        owner, name = PARTS[part]
        real, self.calls = getattr(owner, name), 0

        def counted(*args: Any) -> Any:
            self.calls += 1
            if self.calls in calls:
                raise error
            return real(*args)

        patch.setattr(owner, name, staticmethod(counted) if part == "backward" else counted)


def learner_of(
    config: TrainConfig, budget: int, warnings: list[str], forward: type[Forward] = SharedPrompts
) -> tuple[Learner, list[Group]]:
    """Equal calls give equal weights, samples and random states."""
    policy, groups = off_policy(config)
    made = make_learner(policy, with_budget(config, budget), warnings.append)
    made.forward = forward
    torch.manual_seed(11)
    return made, groups


@pytest.fixture(scope="module")
def config(train_config: Callable[..., TrainConfig]) -> TrainConfig:
    return train_config("adapter.dropout=0.1", "optim.lr=0.01")


@pytest.fixture(scope="module")
def expected(config: TrainConfig) -> dict[str, Tensor]:
    """The state after two updates with half the budget from the start."""
    found = after_updates(config, BUDGET // 2, 2)
    with pytest.raises(AssertionError):  # Cut otherwise, other units are dropped: a comparison can tell.
        assert_equal_states(after_updates(config, BUDGET, 2), found)
    return found


def state(learner: Learner) -> dict[str, Tensor]:
    """Adapter, moments and random state."""
    return {**learner.state()[0], "random": torch.get_rng_state()}


def assert_equal_states(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    assert_identical(list(found.values()), list(expected.values()))


def after_updates(
    config: TrainConfig, budget: int, updates: int, forward: type[Forward] = SharedPrompts
) -> dict[str, Tensor]:
    learner, groups = learner_of(config, budget, [], forward)
    for _ in range(updates):
        learner.update(groups)
    return {name: tensor.clone() for name, tensor in state(learner).items()}


@pytest.mark.parametrize("error", [ON_GPU, ON_CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize(
    ("part", "call"),
    [("prompts", 1), ("forward", 1), ("forward", 2), ("backward", 1), ("backward", 2), ("backward of prompts", 1)],
)
def test_an_update_is_repeated_with_half_the_budget(
    config: TrainConfig,
    expected: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    call: int,
    error: Exception,
) -> None:
    warnings: list[str] = []
    learner, groups = learner_of(config, BUDGET, warnings)
    memory = Memory(monkeypatch, part, [call], error)
    result = learner.update(groups)
    assert memory.calls > call
    assert result.gradient_norm is not None and result.sequences == 8
    assert warnings == [
        "out of memory in an update: repeated with hardware.tokens_per_micro_batch=16, which this run uses from here on"
    ]
    assert all(p.grad is not None and not p.grad.any() for p in learner.policy.parameters)
    learner.update(groups)
    assert_equal_states(state(learner), expected)
    assert len(warnings) == 1


def test_the_metrics_are_those_of_the_pass_that_was_finished(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    learner, groups = learner_of(config, BUDGET // 2, [])
    expected = learner.update(groups)
    learner, groups = learner_of(config, BUDGET, [])
    Memory(monkeypatch, "backward", [2])
    result = learner.update(groups)
    assert len(result.stats) == len(expected.stats)
    assert_identical([part.pi_N for part in result.stats], [part.pi_N for part in expected.stats])
    assert result.gradient_norm == expected.gradient_norm and result.lr == expected.lr
    assert (result.num_positions, result.num_padding) == (expected.num_positions, expected.num_padding)


@pytest.mark.parametrize(("forward", "budget"), [(WholeSequences, 64), (PackedGroups, 32)])
def test_other_ways(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, forward: type[Forward], budget: int) -> None:
    expected = after_updates(config, budget, 1, forward)
    learner, groups = learner_of(config, 2 * budget, [], forward)
    Memory(monkeypatch, "backward", [2])
    learner.update(groups)
    assert learner.budget == budget
    assert_equal_states(state(learner), expected)


def test_the_budget_is_halved_as_often_as_it_takes(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = after_updates(config, 4, 1)
    warnings: list[str] = []
    learner, groups = learner_of(config, BUDGET, warnings)
    Memory(monkeypatch, "forward", [1, 2, 3])
    learner.update(groups)
    assert learner.budget == 4
    assert [text.partition("micro_batch=")[2].split(",")[0] for text in warnings] == ["16", "8", "4"]
    assert_equal_states(state(learner), expected)


def test_the_budget_is_part_of_the_state(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, groups = learner_of(config, BUDGET, [])
    assert learner.state()[1]["budget"] == BUDGET
    with monkeypatch.context() as patch:
        Memory(patch, "forward", [1])
        learner.update(groups)
    tensors, plain = learner.state()
    assert plain["budget"] == BUDGET // 2
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    other, same = learner_of(config, BUDGET, [])
    other.load_state(tensors, plain)
    assert other.budget == BUDGET // 2
    for each, of in ((learner, groups), (other, same)):
        torch.manual_seed(5)
        each.update(of)
    assert_identical(parameters(learner.policy), parameters(other.policy))


# What is not repeated


def unchanged(learner: Learner, groups: Sequence[Group], error: Exception) -> None:
    """The update raises this very error and leaves weights and moments as they were."""
    before = parameters(learner.policy)
    with pytest.raises(type(error)) as found:
        learner.update(groups)
    assert found.value is error
    assert_identical(parameters(learner.policy), before)
    assert all(p.grad is not None and not p.grad.any() for p in learner.policy.parameters)
    assert not learner.optimizer.state and learner.schedule.last_epoch == 0


@pytest.mark.parametrize("part", ["forward", "backward"])
def test_other_errors_pass(config: TrainConfig, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    learner, groups = learner_of(config, BUDGET, warnings := [])
    Memory(monkeypatch, part, [2], error)
    unchanged(learner, groups, error)
    assert (learner.budget, warnings) == (BUDGET, [])


def test_a_budget_of_one_token_gives_up(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, groups = learner_of(config, 5, warnings := [])
    memory = Memory(monkeypatch, "forward", range(1000))
    unchanged(learner, groups, ON_GPU)
    assert (learner.budget, len(warnings), memory.calls) == (1, 2, 3)


def test_a_step_of_the_optimizer_is_not_taken_twice(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has changed some weights when memory runs out, and smaller micro-batches would not help it."""
    learner, groups = learner_of(config, BUDGET, warnings := [])
    real, steps = learner.optimizer.step, []

    def step() -> None:
        real()
        steps.append(1)
        if len(steps) == 1:
            raise ON_GPU

    monkeypatch.setattr(learner.optimizer, "step", step)
    with pytest.raises(torch.OutOfMemoryError):
        learner.update(groups)
    assert (len(steps), learner.budget, warnings) == (1, BUDGET, [])
