"""Values that are not finite: an update refuses them, says where they are, and changes nothing."""

import json
import math
from collections.abc import Sequence
from typing import Any

import make
import pytest
import torch
from torch import Tensor
from updates import assert_identical, broken, off_policy, parameters, with_budget

from dppo_cli.commands.assembly import make_learner
from dppo_cli.errors import NumericalError
from dppo_cli.policy.head import Head
from dppo_cli.training.failures import check_finite, describe, is_out_of_memory
from dppo_cli.training.learner import Learner
from dppo_cli.types import Group

BUDGETS = pytest.mark.parametrize("budget", [8192, 1], ids=["one_batch", "a_sample_at_a_time"])


def refused(learner: Learner, groups: Sequence[Group]) -> str:
    """What the update says; it leaves weights, gradients, moments and schedule as they were."""
    before = parameters(learner.policy)
    with pytest.raises(NumericalError) as error:
        learner.update(groups)
    assert_identical(parameters(learner.policy), before)
    assert all(p.grad is not None and not p.grad.any() for p in learner.policy.parameters)
    assert not learner.optimizer.state and learner.schedule.last_epoch == 0
    assert "\n" not in str(error.value)
    return str(error.value)


def where(groups: Sequence[Group], g: int, i: int, position: int) -> str:
    token = int(groups[g].completions[i].token_ids_T[position])
    problem = groups[g].prompt
    return f"token {token} at position {position} of a response to problem {problem.index} ({problem.example.prompt!r})"


def only_token(groups: Sequence[Group]) -> tuple[int, tuple[int, int, int]]:
    """A token that was sampled once: its id, and its group, sample and position. Not the first group's."""
    found: dict[int, list[tuple[int, int, int]]] = {}
    for g, group in enumerate(groups):
        for i, completion in enumerate(group.completions):
            for position, token in enumerate(completion.token_ids_T.tolist()):
                found.setdefault(token, []).append((g, i, position))
    return next((t, where[0]) for t, where in found.items() if len(where) == 1 and where[0][0] > 0 < where[0][2])


# Where they come from


@BUDGETS
@pytest.mark.parametrize(
    ("objective", "value"), [("dppo", math.nan), ("ppo", math.nan), ("pg_is", math.nan), ("pg_is", -math.inf)]
)
def test_a_log_prob_of_the_rollout(train_config: Any, objective: str, value: float, budget: int) -> None:
    """-inf: a token that could not have been sampled. A trust region drops it; without one its weight is infinite."""
    config = with_budget(train_config(f"objective={objective}", "objective.ratio_cap=null"), budget)
    policy, groups = off_policy(config)
    logp_N = groups[2].completions[1].mu.logp_N.clone()
    logp_N[1] = value
    groups = broken(groups, 2, 1, logp_N)
    text = refused(make_learner(policy, config, make.fail), groups)
    assert f": {where(groups, 2, 1, 1)}" in text
    assert " 1 of " in text


@BUDGETS
def test_a_log_prob_of_the_trainer(train_config: Any, monkeypatch: pytest.MonkeyPatch, budget: int) -> None:
    config = with_budget(train_config(), budget)
    policy, groups = off_policy(config)
    token, (g, i, position) = only_token(groups)
    with monkeypatch.context() as patch:
        poison(patch, token)
        text = refused(make_learner(policy, config, make.fail), groups)
    assert text.startswith("the divergence of 1 of ")
    assert text.endswith(f": {where(groups, g, i, position)}")


def poison(patch: pytest.MonkeyPatch, token: int) -> None:
    """A head whose log-prob of one token is NaN."""
    real = Head.log_probs_and_probs

    def poisoned(self: Head, hidden_NH: Tensor, out_NV: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_pi_NV, pi_NV = real(self, hidden_NH, out_NV)
        log_pi_NV[:, token] = math.nan
        return log_pi_NV, pi_NV

    patch.setattr(Head, "log_probs_and_probs", poisoned)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("limit", ["null", "1.0"])
def test_a_gradient(train_config: Any, value: float, limit: str) -> None:
    config = train_config(f"optim.max_grad_norm={limit}")
    policy, groups = off_policy(config)
    parameter = policy.parameters[1]

    def replaced(gradient: Tensor) -> Tensor:
        return torch.full_like(gradient, value)

    hook = parameter.register_hook(replaced)
    text = refused(make_learner(policy, config, make.fail), groups)
    hook.remove()
    assert text.startswith(f"the gradient is {value}; nothing was updated")


def test_a_reference_that_is_nan(train_config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_config("kl_to_reference=0.1")
    policy, groups = off_policy(config)
    learner = make_learner(policy, config, make.fail)
    real = learner._reference_log_probs
    monkeypatch.setattr(learner, "_reference_log_probs", lambda *batch: real(*batch) * math.nan)
    assert refused(learner, groups).startswith("the loss of ")


# What follows


@pytest.mark.parametrize("when", ["first", "last"])
def test_the_next_update_is_as_if_nothing_had_been(train_config: Any, when: str) -> None:
    """Also where micro-batches before the one that is refused have left their gradient."""
    config = with_budget(train_config("adapter.dropout=0.1"), 1)
    (policy, groups), (other, same) = off_policy(config), off_policy(config)
    lengths = [len(group.completions[0].token_ids_T) for group in groups]
    g = lengths.index(max(lengths) if when == "first" else min(lengths))
    learner, undisturbed = make_learner(policy, config, make.fail), make_learner(other, config, make.fail)
    refused(learner, broken(groups, g, 0, torch.full_like(groups[g].completions[0].mu.logp_N, math.nan)))
    for each, of in ((learner, groups), (undisturbed, same)):
        torch.manual_seed(3)
        each.update(of)
    assert_identical(parameters(policy), parameters(other))


def test_the_schedule_counts_an_update_that_is_left_out(train_config: Any) -> None:
    config = train_config("optim.schedule=cosine", "optim.warmup_updates=1")
    (policy, groups), (other, same) = off_policy(config), off_policy(config)
    learner, undisturbed = make_learner(policy, config, make.fail), make_learner(other, config, make.fail)
    left_out = [learner.skipped(groups), learner.update(groups), learner.skipped(groups), learner.update(groups)]
    assert [each.lr for each in left_out] == [undisturbed.update(same).lr for _ in range(4)]
    assert learner.state()[1]["updates"] == 4
    first = left_out[0]
    assert (first.stats, first.gradient_norm, first.sequences) == ([], None, 8)
    assert (first.num_positions, first.num_padding, first.skipped_sequences) == (0, 0, 0)


# In words


def test_check_finite_counts_and_names_tokens() -> None:
    check_finite(torch.tensor([0.0, -5.0, 1e30]))
    check_finite(torch.tensor([]))
    with pytest.raises(NumericalError, match=r"the loss of 2 of 4 tokens is not finite \(-inf\)") as error:
        check_finite(torch.tensor([0.0, -math.inf, 1.0, math.nan]))
    assert list(error.value.tokens) == [1, 3]


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("Storage size calculation overflowed with sizes=[9223372036854775807, 128]"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (NotImplementedError("no kernel"), False),
    ],
)
def test_which_errors_are_of_memory(error: RuntimeError, is_memory: bool) -> None:
    assert is_out_of_memory(error) is is_memory


def test_the_real_error_of_the_cpu_allocator_is_one_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)


def test_a_description_is_json_with_ids_and_texts() -> None:
    bad = make.completion((5, 6), text="x\ny", logp=(math.nan, -0.5))
    prompt = make.prompt(7, ids=(3, 4))
    (group,) = describe(make.groups([prompt], [[bad, make.completion((8,), logp=(-math.inf,))]], [1.0, -1.0]))
    text = json.dumps(group, allow_nan=False)
    assert json.loads(text) == {
        "problem": 7,
        "prompt": "prompt 7",
        "prompt_token_ids": [3, 4],
        "completions": [
            {"text": "x\ny", "token_ids": [5, 6], "logp_mu": ["nan", "-0.5"], "reward": 0.0, "advantage": 1.0},
            {"text": "", "token_ids": [8], "logp_mu": ["-inf"], "reward": 0.0, "advantage": -1.0},
        ],
    }
