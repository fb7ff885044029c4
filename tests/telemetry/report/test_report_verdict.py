"""The three answers on the first screen."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import figures, metrics, summary, write_lines, write_run

from dppo_cli.telemetry import watch
from dppo_cli.telemetry.report import verdict
from dppo_cli.telemetry.report.data import read_run
from dppo_cli.telemetry.report.verdict import events_of, learned, trust_region, verdicts, warnings


def with_difference(mean: float, interval: list[float] | None) -> dict[str, Any]:
    sets = {"held_out": {"before": figures(0.5, 0.4, 0.6), "after": figures(0.5 + mean, 0.4, 0.9)}}
    sets["held_out"]["difference"] = {"mean": mean, "interval": interval, "problems": 500}
    return summary(12, evaluations=sets)


@pytest.mark.parametrize(
    ("mean", "interval", "answer", "tone"),
    [
        (0.1, [0.05, 0.15], "Yes: +10.0 points", "good"),
        (0.1, [-0.01, 0.2], "No clear change (+10.0 points)", "neutral"),
        (-0.1, [-0.2, -0.05], "It fell: -10.0 points", "bad"),
        (0.0, None, "No clear change (+0.0 points)", "neutral"),
    ],
)
def test_accuracy_went_up_only_where_its_interval_says_so(
    tmp_path: Path, mean: float, interval: list[float] | None, answer: str, tone: str
) -> None:
    found = learned(read_run(write_run(tmp_path / "run", done=with_difference(mean, interval))))
    assert (found.answer, found.tone) == (answer, tone)
    assert found.shares[0] == ("before", 0.5, 0.4, 0.6)


def region(tmp_path: Path, masked: list[float], *overrides: str, stale: float = 0.0) -> tuple[str, str]:
    run = write_run(tmp_path / "run", len(masked), overrides=overrides)
    of_all = {"masked_negative": 0.0, "staleness": stale}
    rows = [{**metrics(i, 9), **of_all, "masked_positive": share} for i, share in enumerate(masked, 1)]
    write_lines(run / "metrics.jsonl", rows)
    found = trust_region(read_run(run))
    return found.answer, found.tone


@pytest.mark.parametrize(
    ("masked", "answer", "tone"),
    [
        ([0.0, 0.01, 0.0], "Yes: it masked tokens in 1 of 3 steps", "good"),
        ([0.0, 0.3, 0.0], "Too busy: up to 30% of one sign masked", "bad"),
        ([0.0, 0.0], "It masked nothing in 2 steps", "neutral"),
        ([0.1, *[0.0] * 30], "Quiet: nothing masked in the last 30 steps", "neutral"),
    ],
)
def test_the_trust_region(tmp_path: Path, masked: list[float], answer: str, tone: str) -> None:
    assert region(tmp_path, masked) == (answer, tone)


def test_with_one_update_per_rollout_the_trust_region_has_nothing_to_do(tmp_path: Path) -> None:
    answer, tone = region(tmp_path, [0.0, 0.0], "batch.prompts_per_update=64")
    assert answer.startswith("It has nothing to do") and tone == "neutral"


def test_filters_and_open_decisions_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 2)
    assert not any("filter" in line or "exact" in line for line in trust_region(read_run(run)).lines)
    rows = [{**metrics(i, 9), "filtered": 0.1 * i, "undecided": 0.02} for i in (1, 2)]
    write_lines(run / "metrics.jsonl", rows)
    lines = trust_region(read_run(run)).lines
    assert "The off-policy filter dropped 15.0% of tokens with A\u00a0≠\u00a00" in lines
    assert "The exact divergence could decide otherwise for 2.0% of them" in lines


def test_unless_samples_are_of_earlier_steps(tmp_path: Path) -> None:
    found = region(tmp_path, [0.0, 0.01], "batch.prompts_per_update=64", stale=1.0)
    assert found == ("Yes: it masked tokens in 1 of 2 steps", "good")


def test_the_thresholds_are_those_of_the_watch() -> None:
    """They are written twice, because the watch needs torch."""
    assert (verdict.QUIET, verdict.BUSY) == (watch.QUIET_STEPS, watch.BUSY_SHARE)


def test_events_are_on_the_time_axis(tmp_path: Path) -> None:
    done = summary(12, interrupted=True, warnings=["no step in it", "step 3: odd", "after step 7: stopped early"])
    run = write_run(tmp_path / "run", done=done)
    (run / "resumes.json").write_text(json.dumps([{"step": 5, "changes": {"steps": [10, 12]}}, "odd"]))
    data = read_run(run)
    events = events_of(data)
    assert [(e.step, e.kind) for e in events] == [
        (None, "warning"),
        (None, "resume"),
        (3, "warning"),
        (5, "resume"),
        (7, "warning"),
        (12, "stop"),
    ]
    assert events[3].text == "went on with steps: [10, 12]"
    flagged = warnings(data, events)
    assert flagged.tone == "bad" and flagged.answer == "4 things were flagged"
    assert flagged.lines[:2] == ["no step in it", "Step 3: odd"]


def test_a_run_without_a_step(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 1)
    (run / "metrics.jsonl").unlink()
    data = read_run(run)
    assert [v.answer for v in verdicts(data, [])] == ["Not measured", "Not measured", "2 things were flagged"]
