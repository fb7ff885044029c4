"""A line of metrics.jsonl: the trust region's figures, rewards and lengths, and the memory that a run held."""

import math
from dataclasses import replace

import make
import pytest
import torch
from make import token_stats as stats
from torch import Tensor

from dppo_cli.algorithm.approx import Binary
from dppo_cli.algorithm.divergence import TotalVariation
from dppo_cli.algorithm.loss import Visitor
from dppo_cli.algorithm.objective import DPPO
from dppo_cli.rollout.collect import Collected
from dppo_cli.training.metrics import rollout_metrics, token_metrics
from dppo_cli.types import Batch, Group, Sample, Score, Status, TokenStats


def approx(value: float) -> object:
    # Means of a few float32 numbers of size <= 1.
    return pytest.approx(value, abs=1e-6)


def test_edge_8_mask_fractions_are_over_tokens_with_an_advantage_of_that_sign():
    found = token_metrics(
        [
            [
                stats(
                    mu=[0.5] * 9,
                    pi=[0.5] * 9,
                    advantage=[1.0, 0.1, 2.0, 1.0, -1.0, -1.0, -0.5, 0.0, 0.0],
                    keep=[False, True, True, True, False, False, True, True, True],
                )
            ]
        ]
    )
    assert found["masked_positive"] == approx(1 / 4)
    assert found["masked_negative"] == approx(2 / 3)


def test_edge_8_no_token_of_a_sign_is_no_fraction_of_zero():
    found = token_metrics([[stats([0.5], [0.6], [1.0])]])
    assert found["masked_positive"] == 0.0
    assert found["masked_negative"] is None


def test_what_the_filter_dropped_and_what_the_bounds_leave_open_are_shares_of_tokens_with_an_advantage():
    """Over micro-batches, too; tokens with A = 0 do not count."""
    first = stats(
        [0.5] * 4, [0.5] * 4, [1.0, -1.0, 1.0, 0.0], filtered=[True, True, False, True], undecided=[False] * 4
    )
    second = stats([0.5] * 2, [0.5] * 2, [1.0, -1.0], filtered=[False] * 2, undecided=[True, False])
    found = token_metrics([[first, second]])
    assert found["filtered"] == approx(2 / 5)
    assert found["undecided"] == approx(1 / 5)
    assert token_metrics([[stats([0.5], [0.5], [1.0])]])["undecided"] is None, "no other bound"


def test_edge_1_mismatch_is_that_of_the_first_update_alone():
    first = [stats([0.5, 0.5], [0.51, 0.5], [1.0, 1.0]), stats([0.2], [0.16], [-1.0])]
    second = [stats([0.5], [0.9], [1.0])]
    found = token_metrics([first, second])
    assert found["mismatch_mean"] == approx((0.01 + 0.0 + 0.04) / 3)
    assert found["shift_mean"] == approx((0.01 + 0.0 + 0.04 + 0.4) / 4)
    assert found["shift_max"] == approx(0.4)


def test_edge_1_equal_policies_have_no_mismatch():
    assert token_metrics([[stats([0.3, 0.9], [0.3, 0.9], [1.0, -1.0])]])["mismatch_mean"] == 0.0


def test_no_mismatch_is_claimed_when_the_first_update_saw_no_token():
    found = token_metrics([[], [stats([0.5], [0.9], [1.0])]])
    assert found["mismatch_mean"] is None
    assert found["shift_mean"] == approx(0.4)


def test_a_step_without_tokens_has_every_figure_and_none_of_them_a_value():
    empty, full = token_metrics([[], []]), token_metrics([[stats([0.5], [0.5], [1.0])]])
    assert set(empty) == set(full)
    assert set(empty.values()) == {None}


def test_entropy_and_reference_kl_are_means_over_tokens_not_over_micro_batches():
    part = stats([0.5] * 3, [0.5] * 3, [1.0] * 3, entropy=1.0, reference_kl=0.2)
    other = stats([0.5], [0.5], [1.0], entropy=3.0, reference_kl=-0.2)
    found = token_metrics([[part], [other]])
    assert found["entropy"] == approx(1.5)
    assert found["reference_kl"] == approx(0.1)


@pytest.mark.parametrize(
    ("size", "ranks"),
    [(1, (1, 1, 1, 1)), (2, (1, 2, 2, 2)), (5, (3, 5, 5, 5)), (10, (5, 9, 10, 10)), (200, (100, 180, 198, 200))],
)
def test_divergence_quantiles_are_of_nearest_rank(size, ranks):
    values = [float(i) for i in range(1, size + 1)]
    shuffled = [values[i] for i in torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()]
    found = token_metrics([[stats([0.5] * size, [0.5] * size, [1.0] * size, divergence=shuffled)]])
    assert tuple(found[f"divergence_p{q}"] for q in (50, 90, 99, 100)) == ranks


def test_ratio_quantiles_are_of_pi_over_mu():
    found = token_metrics([[stats([0.4, 0.4, 0.8], [0.2, 0.6, 0.8], [1.0] * 3)]])
    assert found["ratio_p1"] == approx(0.5)
    assert found["ratio_p50"] == approx(1.0)
    assert found["ratio_p90"] == found["ratio_p100"] == approx(1.5)


def test_an_infinite_divergence_shows_in_the_quantiles():
    found = token_metrics([[stats([0.5] * 2, [0.5] * 2, [1.0] * 2, divergence=[0.1, math.inf])]])
    assert found["divergence_p50"] == approx(0.1)
    assert found["divergence_p100"] == math.inf


# From a batch


def batch() -> Batch:
    """Two responses; the third token of the first one was put in by a tool."""
    logs = [torch.tensor([0.5, 0.25, 0.8]).log(), torch.tensor([0.1]).log()]
    rows = [([11, 12, 99, 1], [True, True, False, True], 1.0), ([13], [True], -1.0)]
    samples = []
    for logp_N, (ids, sampled, advantage) in zip(logs, rows, strict=True):
        completion = make.completion(ids, logp=logp_N.tolist(), sampled=sampled)
        samples.append(Sample(0, completion, advantage, completion.mu))
    return Batch.pack(samples, [(5, 6)], pad_id=0, device=torch.device("cpu"))


def collected() -> TokenStats:
    """What the loss saw of the batch: entropies of 0.7, and a reference 0.05 nats below the policy."""
    packed = batch()
    logp_pi_N = torch.tensor([0.25, 0.5, 0.8, 0.4]).log().requires_grad_()
    log_pi_NV = torch.zeros(4, 100).scatter(1, packed.token_N[:, None], logp_pi_N.detach()[:, None])

    def log_probs(visitor: Visitor) -> tuple[Tensor, Tensor]:
        visitor(slice(0, 4), log_pi_NV)
        return logp_pi_N, torch.full((4,), 0.7)

    loss = make.loss(Binary(), TotalVariation(0.1, 0.1), DPPO(ratio_cap=None), kl_weight=0.1)
    return loss(packed, log_probs, logp_pi_N.detach() - 0.05)[1]


def test_the_loss_puts_each_figure_in_its_column():
    found = collected()
    close = dict(atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mu_N, torch.tensor([0.5, 0.25, 0.8, 0.1]), **close)
    torch.testing.assert_close(found.pi_N, torch.tensor([0.25, 0.5, 0.8, 0.4]), **close)
    torch.testing.assert_close(found.log_ratio_N, torch.tensor([0.5, 2.0, 1.0, 4.0]).log(), **close)
    torch.testing.assert_close(found.divergence_N, torch.tensor([0.25, 0.25, 0.0, 0.3]), **close)
    assert found.advantage_N.tolist() == [1.0, 1.0, 1.0, -1.0]
    assert found.keep_N.tolist() == [True, False, True, True]
    assert found.entropy_N.tolist() == pytest.approx([0.7] * 4)
    assert found.reference_kl_N.tolist() == pytest.approx([0.05] * 4)
    assert not found.pi_N.requires_grad and not found.log_ratio_N.requires_grad


def test_edge_7_what_was_not_sampled_is_in_no_figure_and_the_end_of_sequence_is():
    """Neither the prompts (5, 6) nor a tool's token (99) nor padding (0) count; the end-of-sequence token (1) does."""
    found = collected()
    assert found.token_N.tolist() == [11, 12, 1, 13]
    assert token_metrics([[found]])["shift_mean"] == approx((0.25 + 0.25 + 0.0 + 0.3) / 4)


# Rewards and lengths


def test_rollout_metrics_by_hand():
    """Not judged is neither zero nor a failure; lengths count for every sample, and groups may differ in size."""
    end, cut = (
        make.completion([5, 99, 1], sampled=[True, False, True]),
        replace(make.completion([5]), status=Status.CUT),
    )
    groups = [
        Group(make.prompt(0, (3, 4)), [end, cut, end], [Score(1.0), Score(0.0), Score(None)], [0.5, -0.5, 0.0]),
        Group(make.prompt(1, (3, 4, 5, 6, 7)), [end], [Score(0.5, {"near": 0.25, "form": None})], [0.0]),
    ]
    found = rollout_metrics(Collected(groups, {}), 3, success_reward=0.5)
    assert found.pop("reward_parts") == {"near": 0.25, "form": None}
    assert found == pytest.approx(
        {
            "reward": 1.5 / 3,
            "accuracy": 2 / 3,
            "unjudged": 1 / 4,
            "equal_groups": 1 / 2,
            "sampled_groups": 2,
            "sampling_rounds": 1,
            "prompt_tokens": (3 * 2 + 5) / 4,
            "response_tokens": 10 / 4,
            "response_tokens_max": 3,
            "turns": (2 + 1 + 2 + 2) / 4,
            "reply_tokens": 3 / 4,
            "finished": 3 / 4,
            "staleness": 2.0,
        }
    )


def test_groups_that_were_replaced_count_among_what_was_sampled():
    """The reward is that of the policy, not that of the groups it is trained on."""
    teaches = Group(make.prompt(0), [make.completion()] * 2, [Score(1.0), Score(0.0)], [0.5, -0.5])
    solved = Group(make.prompt(1), [make.completion()] * 2, [Score(1.0), Score(1.0)], [0.0, 0.0])
    found = rollout_metrics(Collected([teaches], {}, replaced=[solved, solved], rounds=3), 1, success_reward=1.0)
    figures = ("reward", "accuracy", "equal_groups", "sampled_groups", "sampling_rounds")
    assert [found[name] for name in figures] == [pytest.approx(5 / 6), pytest.approx(5 / 6), 2 / 3, 3, 3]


def test_a_step_without_samples_has_no_means():
    found = rollout_metrics(Collected([Group(make.prompt(), [], [], [])], {}), 1, success_reward=0.5)
    assert {found[name] for name in ("reward", "accuracy", "unjudged", "response_tokens", "finished")} == {None}
