"""The optimizer's step: clipping, AdamW, the schedule, and gradients that are refused."""

import math

import pytest
import torch
from torch import Tensor
from updates import (
    UNCLIPPED,
    assert_equal_gradients,
    assert_identical,
    broken,
    dense_gradient,
    gradient,
    off_policy,
    parameters,
)

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.sections import AdamW
from dppo_cli.errors import NumericalError
from dppo_cli.training.optimizer import lr_factor
from dppo_cli.training.trainer import UpdateResult


def test_a_large_gradient_is_scaled_to_the_limit(train_config):
    whole, result = gradient_of(train_config(UNCLIPPED))
    norm = result.gradient_norm
    clipped, clipped_result = gradient_of(train_config(f"optim.max_grad_norm={norm / 4}"))
    assert clipped_result.gradient_norm == pytest.approx(norm), "the norm before clipping is reported"
    assert_equal_gradients([4 * g for g in clipped], whole, 1e-5)
    untouched, _ = gradient_of(train_config(f"optim.max_grad_norm={norm * 4}"))
    assert_identical(untouched, whole)


def gradient_of(config: TrainConfig) -> tuple[list[Tensor], UpdateResult]:
    policy, groups = off_policy(config)
    return gradient(make_learner(policy, config), groups)


def test_the_first_step_is_adams(train_config):
    """Adam's first step is lr x sign(gradient) where eps is small; weight decay is decoupled."""
    config = train_config(UNCLIPPED, "optim.lr=0.01", "optim.weight_decay=0.1", "optim.eps=1e-12")
    policy, groups = off_policy(config)
    before = parameters(policy)
    found, _ = gradient(make_learner(policy, config), groups)
    for parameter, old, g in zip(policy.parameters, before, found, strict=True):
        clear = g.abs() > 1e-6
        expected = old * (1 - 0.01 * 0.1) - 0.01 * g.sign()
        torch.testing.assert_close(parameter[clear], expected[clear], rtol=1e-5, atol=1e-6)


def test_the_second_update_starts_from_an_empty_gradient_and_remembers_the_moments(train_config):
    config = train_config(UNCLIPPED, "optim.lr=0.01", "optim.betas=[0.5,0.8]", "optim.eps=1e-6")
    policy, groups = off_policy(config)
    learner = make_learner(policy, config)
    first, _ = gradient(learner, groups)
    before = parameters(policy)
    expected = dense_gradient(policy, config, groups)
    second, _ = gradient(learner, groups)
    assert_equal_gradients(second, expected)
    for parameter, old, g1, g2 in zip(policy.parameters, before, first, second, strict=True):
        mean = (0.5 * 0.5 * g1 + 0.5 * g2) / (1 - 0.5**2)
        square = (0.8 * 0.2 * g1**2 + 0.2 * g2**2) / (1 - 0.8**2)
        torch.testing.assert_close(parameter.detach(), old - 0.01 * mean / (square.sqrt() + 1e-6), rtol=1e-5, atol=1e-6)


def adamw(warmup_updates: int, schedule: str) -> AdamW:
    return AdamW(1e-3, [0.9, 0.999], 1e-8, 0.0, None, warmup_updates, schedule, "stop", 32)


def test_learning_rate_factors():
    constant = [lr_factor(i, 10, adamw(4, "constant")) for i in range(8)]
    assert constant == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [lr_factor(i, 10, adamw(0, "constant")) for i in range(3)] == [1.0, 1.0, 1.0]
    cosine = [lr_factor(i, 10, adamw(2, "cosine")) for i in range(12)]
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)] + [0.0]
    assert cosine == pytest.approx(expected, abs=1e-12)
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.5)
    assert cosine[10] == pytest.approx(0.0, abs=1e-12)
    assert lr_factor(3, 2, adamw(3, "cosine")) == pytest.approx(1.0), "warm-up longer than the run"


def test_the_learning_rate_that_is_reported_is_the_one_that_was_used(train_config):
    config = train_config("optim.lr=0.01", "optim.warmup_updates=2", "optim.schedule=cosine", "steps=4")
    policy, groups = off_policy(config)
    learner, used = make_learner(policy, config), []
    learner.optimizer.register_step_pre_hook(lambda o, args, kwargs: used.append(o.param_groups[0]["lr"]))
    reported = [learner.update(groups).lr for _ in range(4)]
    assert reported == used == pytest.approx([0.005, 0.01, 0.01, 0.005])


def test_the_schedule_counts_updates_not_steps(train_config):
    config = train_config(
        "batch.prompts_per_step=4", "batch.prompts_per_update=2", "batch.epochs=2", "steps=1", "optim.schedule=cosine"
    )
    policy, groups = off_policy(config)
    learner = make_learner(policy, config)
    factors = [learner.update(groups).lr / config.optim.lr for _ in range(4)]
    assert factors == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])


@pytest.mark.parametrize("limit", ["null", "1.0"])
def test_a_gradient_that_is_not_finite_changes_no_weight(train_config, limit):
    config = train_config("objective=pg_is", f"optim.max_grad_norm={limit}")
    policy, groups = off_policy(config)
    groups = broken(groups, 0, 0, torch.full_like(groups[0].completions[0].mu.logp_N, -85.0))
    before = parameters(policy)
    learner = make_learner(policy, config)
    with pytest.raises(NumericalError, match="nothing was updated"):
        learner.update(groups)
    assert_identical(parameters(policy), before)
    assert not learner.optimizer.state


def test_a_log_prob_that_is_nan_is_refused(train_config):
    config = train_config()
    policy, groups = off_policy(config)
    logp_N = groups[1].completions[1].mu.logp_N.clone()
    logp_N[1] = torch.nan
    before = parameters(policy)
    with pytest.raises(NumericalError, match="divergence of 1 of"):
        make_learner(policy, config).update(broken(groups, 1, 1, logp_N))
    assert_identical(parameters(policy), before)
