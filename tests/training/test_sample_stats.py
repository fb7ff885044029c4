"""What an update says of single samples, against a forward pass for each."""

from collections.abc import Callable
from dataclasses import replace

import make
import pytest
import torch
from updates import ADVANTAGES, completions, off_policy, with_budget

from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.types import Group, TokenStats


def kept(groups: list[Group], *which: int) -> list[Group]:
    return [replace(group, kept=g in which) for g, group in enumerate(groups)]


@pytest.mark.parametrize("anchor", ["rollout", "recompute"])
def test_every_token_is_put_back_to_its_sample(train_config: Callable[..., TrainConfig], anchor: str) -> None:
    """Small micro-batches and chunks, which take the samples in another order and cut responses."""
    config = with_budget(train_config("approx=topk", "approx.k=4", f"anchor={anchor}"), 12, head_chunk=3)
    policy, groups = off_policy(config)
    groups = kept(groups, 1, 3)
    if anchor == "recompute":
        groups = make_learner(policy, config).anchored(groups)
    prompts, responses = [group.prompt for group in groups], [group.completions for group in groups]
    log_pi_NV = make.trained_log_probs(policy, prompts, responses, config.sampling.temperature)
    result = make_learner(policy, config).update(groups)
    found = {id(stats.completion): stats for stats in result.kept}
    start = 0
    for number, completion in enumerate(completions(groups)):
        end = start + len(completion.mu.logp_N)
        stats = found.pop(id(completion), None)
        assert (stats is not None) == (number // 2 in (1, 3))
        if stats is not None:
            assert stats.topk_logp_pi_NK is not None and completion.mu.topk_ids_NK is not None
            assert torch.equal(stats.tokens.token_N, completion.token_ids_T[completion.sampled_T])
            assert stats.tokens.advantage_N.tolist() == [ADVANTAGES[number]] * (end - start)
            of_token_N = log_pi_NV[start:end].gather(-1, stats.tokens.token_N[:, None])[:, 0]
            torch.testing.assert_close(stats.tokens.pi_N, of_token_N.exp(), rtol=1e-4, atol=1e-5)
            top_NK = log_pi_NV[start:end].gather(-1, completion.mu.topk_ids_NK)
            torch.testing.assert_close(stats.topk_logp_pi_NK, top_NK, rtol=1e-4, atol=1e-4)
        start = end
    assert found == {} and len(result.stats) > 2
    # What is seen of a sample is part of what is seen of all.
    assert set(TokenStats.cat([s.tokens for s in result.kept]).pi_N.tolist()) <= set(
        TokenStats.cat(result.stats).pi_N.tolist()
    )


def test_looking_changes_nothing(train_config: Callable[..., TrainConfig]) -> None:
    config = train_config("approx=topk", "approx.k=4")
    found = []
    for which in ((), (0, 1, 2, 3)):
        policy, groups = off_policy(config)
        result = make_learner(policy, config).update(kept(groups, *which))
        found.append(([p.detach().clone() for p in policy.parameters], TokenStats.cat(result.stats), result.kept))
    (plain, stats, nothing), (looked, same_stats, samples) = found
    assert all(torch.equal(a, b) for a, b in zip(plain, looked, strict=True))
    assert torch.equal(stats.divergence_N, same_stats.divergence_N)
    assert (nothing, len(samples)) == ([], 8)


@pytest.mark.parametrize("approx", ["binary", "full"])
def test_other_approximations_have_no_list(train_config: Callable[..., TrainConfig], approx: str) -> None:
    config = train_config(f"approx={approx}")
    policy, groups = off_policy(config)
    result = make_learner(policy, config).update(kept(groups, 0))
    assert [stats.topk_logp_pi_NK for stats in result.kept] == [None, None]


def test_samples_that_were_skipped_are_not_seen(train_config: Callable[..., TrainConfig]) -> None:
    advantages = (1.0, 0.0, *ADVANTAGES[2:])
    for words, seen in (((), 1), (("kl_to_reference=0.1",), 2)):
        policy, groups = off_policy(train_config(*words), advantages)
        learner = make_learner(policy, train_config(*words))
        assert len(learner.update(kept(groups, 0)).kept) == seen
        assert learner.skipped(kept(groups, 0)).kept == []
