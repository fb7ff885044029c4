"""The samples that a run writes, against its metrics."""

import math
from pathlib import Path

import pytest
from helpers import read_json, read_lines, train

from dppo_cli.training.run_folder import sample_steps

MASKING = ("optim.lr=0.05", "divergence.delta_low=0.01", "divergence.delta_high=0.01")


def test_the_samples_of_a_run_say_what_its_metrics_say(model: Path, work: Path) -> None:
    """Total variation of the binary approximation and the mask, worked out from the log-probs of each line."""
    words = ("run_dir=run", "samples.every=1", "samples.groups=2", "steps=3", *MASKING)
    assert train(model, *words) == 0
    metrics = read_lines(work / "run/metrics.jsonl")
    assert sample_steps(work / "run") == [1, 2, 3]
    masked_in_all = 0
    for step in (1, 2, 3):
        rows = read_lines(work / f"run/samples/step-{step}.jsonl")
        assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 2
        assert sum(row["score"] for row in rows) / 8 == pytest.approx(metrics[step - 1]["reward"], rel=1e-5)
        divergences, positive, negative = [], [], []
        for row in (row for row in rows if row["advantage"]):
            tokens = zip(row["logp_mu"], row["logp_pi"], row["divergence"], row["keep"], strict=True)
            for logp_mu, logp_pi, divergence, keep in tokens:
                mu, pi = math.exp(logp_mu), math.exp(logp_pi)
                assert divergence == pytest.approx(abs(mu - pi), abs=1e-5)
                sign = 1 if row["advantage"] > 0 else -1
                if abs(divergence - 0.01) > 1e-5 and abs(pi - mu) > 1e-4:
                    assert keep is not (divergence > 0.01 and sign * (pi - mu) > 0)
                (positive if sign > 0 else negative).append(not keep)
                divergences.append(divergence)
        masked_in_all += sum(positive) + sum(negative)
        line = metrics[step - 1]
        assert max(divergences) == pytest.approx(line["divergence_p100"], rel=1e-5)
        assert sum(positive) / len(positive) == pytest.approx(line["masked_positive"])
        assert sum(negative) / len(negative) == pytest.approx(line["masked_negative"])
    assert masked_in_all > 0
    assert "samples" not in str(read_json(work / "run/summary.json")["warnings"])


def test_pi_is_that_of_the_first_update_of_a_token(model: Path, work: Path) -> None:
    """All groups are in the first of two updates, when pi is mu."""
    words = ("run_dir=run", "batch.prompts_per_update=2", "batch.epochs=2", "steps=1", "optim.lr=0.05")
    assert train(model, *words, "approx=topk", "approx.k=3", "divergence.delta_low=0.1") == 0
    rows = [row for row in read_lines(work / "run/samples/step-1.jsonl") if row["advantage"]]
    assert len(rows) > 4
    for row in rows:
        assert row["logp_pi"] == pytest.approx(row["logp_mu"], abs=1e-4)
        assert [len(ids) for ids in row["top_ids"]] == [3] * len(row["token_ids"])
        for mu, pi in zip(row["top_logp_mu"], row["top_logp_pi"], strict=True):
            assert pi == pytest.approx(mu, abs=1e-4)
    # Those of the second update, where it moved.
    assert read_lines(work / "run/metrics.jsonl")[0]["divergence_p100"] > 0.01
