"""The tokens that the trust region masked most, over a whole run."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make import token_stats as stats

from dppo_cli.telemetry.trust_region import MOST, MaskedTokens
from dppo_cli.types import RunInfo, StepReport, TokenStats

MIXED: dict[str, Any] = dict(
    mu=[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
    pi=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
    advantage=[1.0, 1.0, 1.0, -1.0, -2.0, 1.0, 0.0],
    keep=[False, False, True, False, True, False, False],
    token=[7, 7, 7, 7, 8, 9, 9],
)
"""Tokens of both signs, masked and kept."""


def masked_tokens(*parts: TokenStats) -> MaskedTokens:
    table = MaskedTokens(text_of=lambda token: f"<{token}>")
    for part in parts:
        table.add(part)
    return table


def report(*updates: list[TokenStats]) -> StepReport:
    return StepReport({"step": 1}, [], updates)


def run_info(folder: Path) -> RunInfo:
    return RunInfo(folder, 0, 1, "some/model", 20, 10, "cpu", "float32", "merged weights")


def test_masked_tokens_by_hand():
    """Signs of A are apart, tokens never masked are left out, and so is what has no advantage."""
    rows = masked_tokens(stats(**MIXED), stats(**MIXED)).rows(10)
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
    table = masked_tokens(stats(**MIXED), stats(**MIXED))
    assert [(row["token"], row["masked"]) for row in table.rows(1)] == [(7, 4)]
    assert table.rows(0) == []


def test_masked_tokens_are_ranked_by_times_masked_not_by_times_seen():
    table = masked_tokens(
        stats([0.5] * 5, [0.6] * 5, [1.0] * 5, keep=[False, True, True, False, False], token=[3, 3, 3, 8, 8])
    )
    assert [(row["token"], row["masked"], row["seen"]) for row in table.rows(10)] == [(8, 2, 2), (3, 1, 3)]


def test_nothing_masked_is_an_empty_table():
    kept, without_advantage = stats([0.5], [0.6], [1.0]), stats([0.5], [0.6], [0.0])
    assert masked_tokens(kept, replace(without_advantage, keep_N=torch.tensor([False]))).rows(10) == []


def test_a_step_counts_every_part_of_every_update():
    one = stats([0.5], [0.25], [1.0], keep=[False], token=[4])
    other = stats([0.3], [0.35], [1.0], keep=[False], token=[4])
    table = masked_tokens()
    table.stepped(report([one, other], [], [one]))
    table.stepped(report([], []))
    (row,) = table.rows(10)
    assert (row["masked"], row["seen"]) == (3, 3)
    assert (row["mean_mu"], row["mean_pi"]) == pytest.approx((1.3 / 3, 0.85 / 3), abs=1e-6)


# The file


def test_the_end_of_a_run_writes_the_table(tmp_path: Path):
    many = MOST + 5
    table = masked_tokens()
    table.started(run_info(tmp_path))
    table.stepped(
        report([stats([0.5] * many, [0.6] * many, [1.0] * many, keep=[False] * many, token=list(range(many)))])
    )
    assert list(tmp_path.iterdir()) == []
    table.finished({"steps": 1})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["masked_by_mu.json", "masked_tokens.json"]
    assert json.loads((tmp_path / "masked_by_mu.json").read_text(encoding="utf-8")) == table.by_mu.rows()
    written = json.loads((tmp_path / "masked_tokens.json").read_text(encoding="utf-8"))
    assert len(written) == MOST
    assert written == table.rows(MOST)


def test_a_run_without_a_summary_writes_nothing(tmp_path: Path):
    """It ended by an error, and its folder may be gone; or it never began."""
    table = masked_tokens(stats(**MIXED))
    table.finished(None)
    table.started(run_info(tmp_path / "gone"))
    table.finished(None)
    assert list(tmp_path.iterdir()) == []


# Resuming


def test_resumed_counts_go_on_as_if_undisturbed():
    """Exactly: the sums are carried, not the means. Through JSON, as a checkpoint keeps them."""
    generator = torch.Generator().manual_seed(0)

    def part() -> TokenStats:
        mu_N, pi_N, draw_N = torch.rand(3, 40, generator=generator) * 0.98 + 0.01
        token_N = torch.randint(5, (40,), generator=generator)
        advantage_N = torch.randint(-1, 2, (40,), generator=generator).float()
        keep = (draw_N > 0.5).tolist()
        return stats(mu_N.tolist(), pi_N.tolist(), advantage_N.tolist(), keep=keep, token=token_N.tolist())

    parts = [part() for _ in range(6)]
    whole = masked_tokens(*parts)
    assert len(whole.rows(20)) == 10
    for cut in range(len(parts) + 1):
        resumed = masked_tokens()
        resumed.load_state(json.loads(json.dumps(masked_tokens(*parts[:cut]).state())))
        for later in parts[cut:]:
            resumed.add(later)
        assert resumed.rows(20) == whole.rows(20)
        assert resumed.by_mu.rows() == whole.by_mu.rows()
        assert resumed.state() == whole.state()


def test_loading_replaces_what_was_counted():
    table = masked_tokens(stats(**MIXED))
    table.load_state(json.loads(json.dumps(masked_tokens().state())))
    assert table.rows(10) == []
