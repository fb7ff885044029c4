import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dppo_cli.algorithm.objective import Tokens
from dppo_cli.telemetry.trust_region import MaskedTokens, TokenStats, step_metrics
from dppo_cli.types import Batch, Completion, PolicyReport, Prompt, Sample


def stats(
    mu: list[float],
    pi: list[float],
    advantage: list[float],
    keep: list[bool] | None = None,
    token: list[int] | None = None,
    divergence: list[float] | None = None,
    entropy: float = 0.0,
    reference_kl: float = 0.0,
) -> TokenStats:
    mu_N, pi_N = torch.tensor(mu), torch.tensor(pi)
    return TokenStats(
        token_N=torch.tensor(token or [0] * len(mu)),
        mu_N=mu_N,
        pi_N=pi_N,
        log_ratio_N=pi_N.log() - mu_N.log(),
        divergence_N=torch.tensor(divergence or [0.0] * len(mu)),
        advantage_N=torch.tensor(advantage),
        keep_N=torch.tensor(keep or [True] * len(mu)),
        entropy_N=torch.full((len(mu),), entropy),
        reference_kl_N=torch.full((len(mu),), reference_kl),
    )


def approx(value: float) -> object:
    # Means of a few float32 numbers of size <= 1.
    return pytest.approx(value, abs=1e-6)


def test_edge_8_mask_fractions_are_over_tokens_with_an_advantage_of_that_sign():
    found = step_metrics(
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
    found = step_metrics([[stats([0.5], [0.6], [1.0])]])
    assert found["masked_positive"] == 0.0
    assert found["masked_negative"] is None


def test_edge_1_mismatch_is_that_of_the_first_update_alone():
    first = [stats([0.5, 0.5], [0.51, 0.5], [1.0, 1.0]), stats([0.2], [0.16], [-1.0])]
    second = [stats([0.5], [0.9], [1.0])]
    found = step_metrics([first, second])
    assert found["mismatch_mean"] == approx((0.01 + 0.0 + 0.04) / 3)
    assert found["shift_mean"] == approx((0.01 + 0.0 + 0.04 + 0.4) / 4)
    assert found["shift_max"] == approx(0.4)


def test_edge_1_equal_policies_have_no_mismatch():
    assert step_metrics([[stats([0.3, 0.9], [0.3, 0.9], [1.0, -1.0])]])["mismatch_mean"] == 0.0


def test_no_mismatch_is_claimed_when_the_first_update_saw_no_token():
    found = step_metrics([[], [stats([0.5], [0.9], [1.0])]])
    assert found["mismatch_mean"] is None
    assert found["shift_mean"] == approx(0.4)


def test_a_step_without_tokens_has_every_figure_and_none_of_them_a_value():
    empty, full = step_metrics([[], []]), step_metrics([[stats([0.5], [0.5], [1.0])]])
    assert set(empty) == set(full)
    assert set(empty.values()) == {None}


def test_entropy_and_reference_kl_are_means_over_tokens_not_over_micro_batches():
    part = stats([0.5] * 3, [0.5] * 3, [1.0] * 3, entropy=1.0, reference_kl=0.2)
    other = stats([0.5], [0.5], [1.0], entropy=3.0, reference_kl=-0.2)
    found = step_metrics([[part], [other]])
    assert found["entropy"] == approx(1.5)
    assert found["reference_kl"] == approx(0.1)


@pytest.mark.parametrize(
    ("size", "ranks"),
    [(1, (1, 1, 1, 1)), (2, (1, 2, 2, 2)), (5, (3, 5, 5, 5)), (10, (5, 9, 10, 10)), (200, (100, 180, 198, 200))],
)
def test_divergence_quantiles_are_of_nearest_rank(size, ranks):
    values = [float(i) for i in range(1, size + 1)]
    shuffled = [values[i] for i in torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()]
    found = step_metrics([[stats([0.5] * size, [0.5] * size, [1.0] * size, divergence=shuffled)]])
    assert tuple(found[f"divergence_p{q}"] for q in (50, 90, 99, 100)) == ranks


def test_ratio_quantiles_are_of_pi_over_mu():
    found = step_metrics([[stats([0.4, 0.4, 0.8], [0.2, 0.6, 0.8], [1.0] * 3)]])
    assert found["ratio_p1"] == approx(0.5)
    assert found["ratio_p50"] == approx(1.0)
    assert found["ratio_p90"] == found["ratio_p100"] == approx(1.5)


def test_an_infinite_divergence_shows_in_the_quantiles():
    found = step_metrics([[stats([0.5] * 2, [0.5] * 2, [1.0] * 2, divergence=[0.1, math.inf])]])
    assert found["divergence_p50"] == approx(0.1)
    assert found["divergence_p100"] == math.inf


# From a batch --------------------------------------------------------------------------------------------------------


def batch() -> Batch:
    """Two responses; the third token of the first one was put in by a tool."""
    logs = [torch.tensor([0.5, 0.25, 0.8]).log(), torch.tensor([0.1]).log()]
    rows = [([11, 12, 99, 1], [True, True, False, True], 1.0), ([13], [True], -1.0)]
    samples = []
    for logp_N, (ids, sampled, advantage) in zip(logs, rows, strict=True):
        prompt = Prompt(0, "", (5, 6), "", {})
        mu = PolicyReport(logp_N)
        completion = Completion(prompt, torch.tensor(ids), torch.tensor(sampled), mu, "", True, 0)
        samples.append(Sample(completion, 0.0, advantage, mu))
    return Batch.pack(samples, pad_id=0, device=torch.device("cpu"))


def collected(logp_pi_N: Tensor) -> TokenStats:
    packed = batch()
    tokens = Tokens(
        logp_pi_N=logp_pi_N.requires_grad_(),
        logp_mu_N=packed.mu.logp_N,
        logp_anchor_N=torch.zeros(4),
        advantage_N=packed.advantage_N,
        divergence_N=torch.tensor([0.1, 0.2, 0.3, 0.4]),
        sequence_N=packed.row_N,
        delta_low=0.1,
        delta_high=0.1,
    )
    keep_N = torch.tensor([True, False, True, True])
    return TokenStats.collect(packed, tokens, keep_N, torch.full((4,), 0.7), torch.full((4,), 0.05))


def test_collect_puts_each_figure_in_its_place():
    found = collected(torch.tensor([0.25, 0.5, 0.8, 0.4]).log())
    close = dict(atol=1e-6, rtol=0)
    torch.testing.assert_close(found.mu_N, torch.tensor([0.5, 0.25, 0.8, 0.1]), **close)
    torch.testing.assert_close(found.pi_N, torch.tensor([0.25, 0.5, 0.8, 0.4]), **close)
    torch.testing.assert_close(found.log_ratio_N, torch.tensor([0.5, 2.0, 1.0, 4.0]).log(), **close)
    assert found.divergence_N.tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert found.advantage_N.tolist() == [1.0, 1.0, 1.0, -1.0]
    assert found.keep_N.tolist() == [True, False, True, True]
    assert found.entropy_N.tolist() == pytest.approx([0.7] * 4)
    assert found.reference_kl_N.tolist() == pytest.approx([0.05] * 4)
    assert not found.pi_N.requires_grad and not found.log_ratio_N.requires_grad


def test_edge_7_what_was_not_sampled_is_in_no_figure_and_the_end_of_sequence_is():
    """Neither the prompts (5, 6) nor a tool's token (99) nor padding (0) count; the end-of-sequence token (1) does."""
    found = collected(torch.tensor([0.25, 0.5, 0.8, 0.4]).log())
    assert found.token_N.tolist() == [11, 12, 1, 13]
    assert step_metrics([[found]])["shift_mean"] == approx((0.25 + 0.25 + 0.0 + 0.3) / 4)


# Masked tokens -------------------------------------------------------------------------------------------------------


def tally() -> MaskedTokens:
    table = MaskedTokens()
    for _ in range(2):
        table.add(
            stats(
                mu=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
                pi=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
                advantage=[1.0, 1.0, 1.0, -1.0, -2.0, 1.0, 0.0],
                keep=[False, False, True, False, True, False, False],
                token=[7, 7, 7, 7, 8, 9, 9],
            )
        )
    return table


def test_masked_tokens_by_hand():
    """Signs of A are apart, tokens never masked are left out, and so is what has no advantage."""
    rows = tally().rows(10, lambda token: f"<{token}>")
    expected = [
        ("<7>", "+", 4, 6, 0.85, 0.15),
        ("<7>", "-", 2, 2, 0.6, 0.4),
        ("<9>", "+", 2, 2, 0.4, 0.6),
    ]
    keys = ("text", "advantage", "masked", "seen", "mean_mu", "mean_pi")
    assert [row["token"] for row in rows] == [7, 7, 9]
    for row, values in zip(rows, expected, strict=True):
        assert tuple(row[key] for key in keys[:4]) == values[:4]
        assert [row[key] for key in keys[4:]] == pytest.approx(list(values[4:]), abs=1e-6)


def test_masked_tokens_are_cut_to_the_most_masked():
    assert [(row["token"], row["masked"]) for row in tally().rows(1, str)] == [(7, 4)]
    assert tally().rows(0, str) == []


def test_masked_tokens_are_ranked_by_times_masked_not_by_times_seen():
    table = MaskedTokens()
    table.add(stats([0.5] * 5, [0.6] * 5, [1.0] * 5, keep=[False, True, True, False, False], token=[3, 3, 3, 8, 8]))
    assert [(row["token"], row["masked"], row["seen"]) for row in table.rows(10, str)] == [(8, 2, 2), (3, 1, 3)]


def test_nothing_masked_is_an_empty_table():
    table = MaskedTokens()
    table.add(stats([0.5], [0.6], [1.0]))
    table.add(replace(stats([0.5], [0.6], [0.0]), keep_N=torch.tensor([False])))
    assert table.rows(10, str) == []
