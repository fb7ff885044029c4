"""An update that several processes share is the one that a single process makes."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import crews
import make
import pytest
import torch
from updates import UNCLIPPED, broken, completions, off_policy, parameters, with_budget

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.replica import OF_LEARNER
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.errors import NumericalError, RunError
from dppo_cli.policy.policy import Policy
from dppo_cli.training.learner import Learner
from dppo_cli.training.shared import SharedLearner, WorkersLearner, balanced, tokens
from dppo_cli.training.trainer import UpdateResult
from dppo_cli.types import Group, TokenStats


@contextmanager
def shared(config: TrainConfig, processes: int, warn=make.fail) -> Iterator[tuple[SharedLearner, list[Policy]]]:
    """One whose workers have policies of their own; all policies, the main process's first."""
    policies = [off_policy(config)[0] for _ in range(processes)]
    pairs = zip(policies, crews.worlds(processes), strict=True)
    own, *others = [make_learner(policy, config, warn, world) for policy, world in pairs]
    tables = [{name: getattr(WorkersLearner(learner), name) for name in OF_LEARNER} for learner in others]
    with crews.crew(*tables, warn=warn) as workers:
        yield SharedLearner(own, workers), policies


def seen(result: UpdateResult) -> TokenStats:
    """All tokens, in an order that does not depend on who saw them."""
    stats = TokenStats.cat(result.stats)
    order = (stats.mu_N.double() * 1e6 + stats.token_N).sort().indices
    return TokenStats.map(lambda columns: columns[0][order], [stats])


@pytest.mark.parametrize("processes", [2, 3, 5])
@pytest.mark.parametrize("words", [(), ("kl_to_reference=0.3", "approx=topk"), ("aggregation=seq_mean_token_sum",)])
def test_weights_and_statistics_are_those_of_one_process(train_config, processes: int, words) -> None:
    """With five there are more processes than groups."""
    config = with_budget(train_config(UNCLIPPED, "optim.lr=0.01", *words), 40)
    policy, groups = off_policy(config)
    before = parameters(policy)
    alone = make_learner(policy, config)
    expected = [alone.update(groups), alone.update(groups[:2])]
    with shared(config, processes) as (learner, policies):
        found = [learner.update(groups), learner.update(groups[:2])]
        assert max(float((a - b).abs().max()) for a, b in zip(parameters(policy), before, strict=True)) > 1e-3
        for other in policies:
            for a, b in zip(parameters(other), parameters(policies[0]), strict=True):
                assert a.equal(b), "the same in all, bit for bit"
            for a, b in zip(parameters(other), parameters(policy), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
            assert all(float(p.grad.abs().max()) == 0 for p in other.parameters)
    for a, b in zip(found, expected, strict=True):
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-4)
        assert (a.lr, a.sequences, a.skipped_sequences) == (b.lr, b.sequences, b.skipped_sequences)
        assert a.num_positions - a.num_padding == b.num_positions - b.num_padding
        for x, y in zip(vars(seen(a)).values(), vars(seen(b)).values(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


def test_samples_without_advantage_are_skipped_in_all(train_config) -> None:
    config = train_config()
    _, groups = off_policy(config, [1.0, -1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0])
    with shared(config, 2) as (learner, _):
        result = learner.update(groups)
    assert (result.sequences, result.skipped_sequences) == (8, 5)
    assert sum(len(part.token_N) for part in result.stats) == sum(
        len(c.token_ids_T)
        for c, a in zip(completions(groups), make.flat([g.advantages for g in groups]), strict=True)
        if a
    )


def test_kept_samples_are_those_of_the_main_process(train_config) -> None:
    config = train_config("approx=topk")
    policy, groups = off_policy(config)
    groups = [replace(group, kept=number in (0, 3)) for number, group in enumerate(groups)]
    expected = {id(s.completion): s for s in make_learner(policy, config).update(groups).kept}
    with shared(config, 3) as (learner, _):
        found = {id(s.completion): s for s in learner.update(groups).kept}
    assert found.keys() == expected.keys() == {id(c) for g in (0, 3) for c in groups[g].completions}
    for key, stats in found.items():
        torch.testing.assert_close(stats.tokens.pi_N, expected[key].tokens.pi_N, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(stats.topk_logp_pi_NK, expected[key].topk_logp_pi_NK, rtol=1e-4, atol=1e-4)


def test_anchors_are_those_of_one_process(train_config) -> None:
    config = train_config("approx=topk", "approx.k=3")
    policy, groups = off_policy(config)
    expected = make_learner(policy, config).anchored(groups)
    with shared(config, 3) as (learner, _):
        found = learner.anchored(groups)
    for a, b in zip(found, expected, strict=True):
        assert a.prompt is b.prompt and a.completions is b.completions
        for x, y in zip(a.anchors, b.anchors, strict=True):
            torch.testing.assert_close(x.logp_N, y.logp_N, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(x.topk_logp_NK, y.topk_logp_NK, rtol=1e-5, atol=1e-5)


def test_dropout_follows_from_the_state_of_the_main_process(train_config) -> None:
    """So a run that was stopped goes on as one that was not, and no two processes drop the same."""
    config = train_config("adapter.dropout=0.5")
    policy, groups = off_policy(config)
    nothing = UpdateResult([], [], None, 0.0, 0, 0, 0, 0)

    def table(seeds: list[int]) -> dict[str, Any]:
        def anchors(groups: Sequence[Group], seed: int) -> list[None]:
            seeds.append(seed)
            return [None] * len(groups)

        def gradient(groups: Sequence[Group], seed: int, *how: float) -> tuple[UpdateResult, list[int], float]:
            seeds.append(seed)
            return nothing, [], how[-1]

        return {"anchors": anchors, "gradient": gradient, "step": lambda: None}

    def seeds() -> list[list[int]]:
        found: list[list[int]] = [[], []]
        torch.manual_seed(4)
        with crews.crew(*map(table, found)) as workers:
            learner = SharedLearner(make_learner(policy, config), workers)
            learner.anchored(groups)
            learner.update(groups)
        return found

    first = seeds()
    assert first == seeds() and len(set(make.flat(first))) == 4


@pytest.mark.parametrize("which", [0, 3])
def test_an_update_that_fails_in_one_process_changes_none(train_config, which: int) -> None:
    config = train_config(UNCLIPPED, "optim.lr=0.01")
    policy, groups = off_policy(config)
    n = len(groups[which].completions[0].mu.logp_N)
    bad = broken(groups, which, 0, torch.full((n,), torch.nan))
    alone = make_learner(policy, config)
    alone.skipped(groups)
    alone.update(groups)
    with shared(config, 3) as (learner, policies):
        before = parameters(policies[0])
        with pytest.raises(NumericalError, match=f"a response to problem {groups[which].prompt.index} "):
            learner.update(bad)
        for other in policies:
            assert all(a.equal(b) for a, b in zip(parameters(other), before, strict=True))
            assert all(float(p.grad.abs().max()) == 0 for p in other.parameters)
        assert learner.skipped(groups).sequences == 8
        learner.update(groups)
        for other in policies:
            for a, b in zip(parameters(other), parameters(policy), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_a_gradient_that_is_not_finite(train_config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_config()
    _, groups = off_policy(config)
    with shared(config, 2) as (learner, policies):
        before = parameters(policies[0])
        gradient = Learner.gradient

        def infinite(self: Learner, *given: Any) -> UpdateResult:
            result = gradient(self, *given)
            self.policy.parameters[0].grad.fill_(torch.inf)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Learner, "gradient", infinite)
            with pytest.raises(NumericalError, match="the gradient is "):
                learner.update(groups)
        for other in policies:
            assert all(a.equal(b) for a, b in zip(parameters(other), before, strict=True))
        assert learner.update(groups).gradient_norm > 0, "nothing of it is left"


def test_memory_that_runs_out_in_a_worker(train_config, monkeypatch: pytest.MonkeyPatch) -> None:
    """It halves its own micro-batches, which the run is told of."""
    config = with_budget(train_config(UNCLIPPED, "optim.lr=0.01"), 80)
    policy, groups = off_policy(config)
    make_learner(policy, config).update(groups)
    told: list[str] = []
    backward = Learner._backward

    def fails(self: Learner, *given: Any) -> UpdateResult:
        if self.world.rank == 1 and self.budget == 80:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return backward(self, *given)

    monkeypatch.setattr(Learner, "_backward", fails)
    with shared(config, 2, told.append) as (learner, policies):
        learner.update(groups)
        for a, b in zip(parameters(policies[0]), parameters(policy), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5)
        assert learner.state()[1]["budget"] == 40, "all go on with it, after a resume, too"
    assert len(told) == 1 and "repeated with hardware.tokens_per_micro_batch=40" in told[0]


def test_a_worker_that_ends_during_a_sum(train_config, monkeypatch: pytest.MonkeyPatch) -> None:
    config = train_config()
    _, groups = off_policy(config)

    def step(self: Learner, check: Any = None) -> float:
        if self.world.rank == 1:
            raise SystemExit
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Learner, "step", step)
    with shared(config, 2) as (learner, _), pytest.raises(RunError, match="process 2 of 2 has ended"):
        learner.update(groups)


def test_workers_take_over_the_state_of_the_main_process(train_config) -> None:
    config = train_config("optim.lr=0.01", "optim.warmup_updates=3")
    policy, groups = off_policy(config)
    trained = make_learner(policy, config)
    trained.update(groups)
    with shared(config, 2) as (learner, policies):
        learner.load_state(*trained.state())
        learner.crew.begin_all("load_state", *learner.state())
        learner.crew.ended()
        trained.update(groups)
        learner.update(groups)
        for other in policies:
            for a, b in zip(parameters(other), parameters(policy), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_loads_are_balanced() -> None:
    assert balanced([5, 1, 4, 3], 2) == [[0, 1], [2, 3]]
    assert balanced([1, 1, 1, 1, 1], 2) == [[0, 2, 4], [1, 3]]
    assert balanced([0, 0, 7], 2) == [[2], [0, 1]]
    assert balanced([3], 3) == [[0], [], []]
    assert balanced([], 2) == [[], []]
    loads = [(7 * n) % 11 for n in range(40)]
    parts = balanced(loads, 4)
    assert sorted(make.flat(parts)) == list(range(40))
    totals = [sum(loads[n] for n in part) for part in parts]
    assert max(totals) - min(totals) <= max(loads)


def test_the_load_of_a_group_is_what_runs(train_config) -> None:
    _, groups = off_policy(train_config(), [1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 2.0])
    prompts = [len(group.prompt.token_ids) for group in groups]
    of_samples = [[len(c.token_ids_T) for c in group.completions] for group in groups]
    expected = [prompts[0] + of_samples[0][0], 0, prompts[2] + sum(of_samples[2]), prompts[3] + of_samples[3][1]]
    assert [tokens(group, every=False) for group in groups] == expected
    assert [tokens(group, every=True) for group in groups] == [
        p + sum(s) for p, s in zip(prompts, of_samples, strict=True)
    ]
