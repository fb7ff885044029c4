"""The page of a sweep: what varied, seeds grouped, jobs that failed."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import figures, summary, write_run
from test_report_page import Parsed, data_of

from dppo_cli.errors import RunError
from dppo_cli.telemetry.report.sweep_data import read_jobs, settings, spread
from dppo_cli.telemetry.report.sweep_page import sweep_page


def result(after: float) -> dict[str, Any]:
    sets = {"held_out": {"before": figures(0.3, 0.2, 0.4), "after": figures(after, after - 0.1, after + 0.1)}}
    sets["held_out"]["difference"] = {"mean": after - 0.3, "interval": [after - 0.4, after - 0.2], "problems": 9}
    return summary(6, evaluations=sets)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two learning rates and two seeds each; the first is better in both. A fifth job failed before its first step."""
    folder = tmp_path / "sweep"
    after = {(0.001, 1): 0.7, (0.001, 2): 0.8, (0.0001, 1): 0.5, (0.0001, 2): 0.6}
    for i, ((lr, seed), accuracy) in enumerate(after.items()):
        words = [f"optim.lr={lr}", f"seed={seed}", f"run_dir={folder / str(i)}"]
        write_run(folder / str(i), 6, done=result(accuracy), overrides=words)
    (folder / "4").mkdir()
    (folder / "4/job.json").write_text(json.dumps({"number": 4, "error": "optim.lr=-1 <b>breaks</b> a rule"}))
    return folder


def test_seeds_are_grouped_and_the_best_mean_comes_first(sweep: Path) -> None:
    jobs = read_jobs(sweep)
    assert [job.name for job in jobs] == ["0", "1", "2", "3", "4"]
    ranked = settings(jobs)
    assert [(s.name, s.figures("after")) for s in ranked] == [
        ("optim.lr=0.001", [0.7, 0.8]),
        ("optim.lr=0.0001", [0.5, 0.6]),
    ]
    assert ranked[0].mean_after == pytest.approx(0.75)
    assert spread([0.7, 0.8]) == "75.0% ± 7.1" and spread([0.7]) == "70.0%" and spread([]) == "–"


def test_settings_are_named_as_they_were_typed(sweep: Path) -> None:
    """A choice of a recipe changes several keys of the config, and has one name; numbers stay numbers."""
    for i, (method, lr) in enumerate([("ppo", "1e-3"), ("ppo", "1e-3"), ("dppo_tv", "1e-4"), ("dppo_tv", "1e-4")]):
        overrides = [f"recipes/method={method}", f"optim.lr={lr}", "steps=6", f"seed={i % 2 + 1}"]
        (sweep / str(i) / "job.json").write_text(json.dumps({"number": i, "overrides": overrides, "error": None}))
    ranked = settings(read_jobs(sweep))
    assert [(s.name, len(s.jobs)) for s in ranked] == [
        ("method=ppo optim.lr=0.001", 2),
        ("method=dppo_tv optim.lr=0.0001", 2),
    ]
    (sweep / "3/job.json").unlink()
    assert [s.name for s in settings(read_jobs(sweep))] == ["optim.lr=0.001", "optim.lr=0.0001"], "not of all jobs"


def test_the_page_of_a_sweep(sweep: Path) -> None:
    html = sweep_page(sweep)
    text = Parsed(html).text
    assert "Which setting is best? ✓ optim.lr=0.001" in text.replace("?✓", "? ✓")
    assert "Yes: in every seed" in text and "75.0% ± 7.1" in text and "55.0% ± 7.1" in text
    assert "Job 4 failed: optim.lr=-1 <b>breaks</b> a rule" in text and "1 thing flagged" in text
    drawn = data_of(html)["figures"]
    assert {"accuracy", "reward", "masked_positive", "time-tokens_per_second", "coordinates"} <= set(drawn)
    assert len(drawn["reward"]["data"]) == 4
    assert [t["showlegend"] for t in drawn["reward"]["data"]] == [True, False, True, False]


def test_parallel_coordinates(sweep: Path) -> None:
    """An axis for what varied, and one for the accuracy; a line for each job."""
    plot = data_of(sweep_page(sweep))["figures"]["coordinates"]
    assert plot["layout"]["xaxis"]["ticktext"] == ["optim.lr", "accuracy after"]
    lines = sorted(tuple(round(v, 6) for v in trace["y"]) for trace in plot["data"])
    assert lines == [(0, 0), (0, 0.333333), (1, 0.666667), (1, 1)]
    colours = {trace["line"]["color"] for trace in plot["data"]}
    assert colours == {"var(--q1)", "var(--q2)", "var(--q3)", "var(--q4)"}


def test_seeds_that_overlap_and_single_seeds(sweep: Path, tmp_path: Path) -> None:
    (sweep / "2/summary.json").write_text(json.dumps(result(0.75)))
    text = Parsed(sweep_page(sweep)).text
    assert "No: the seeds overlap" in text
    for job in "134":
        (sweep / job).rename(tmp_path / f"elsewhere-{job}")
    text = Parsed(sweep_page(sweep)).text
    assert "Cannot be said from one seed" in text and "optim.lr=0.0001" in text


def test_a_job_that_was_stopped_and_went_on_by_itself_has_not_failed(sweep: Path) -> None:
    """`dppo train resume=` of a job writes no record of the sweep."""
    record = {"number": 1, "status": 130, "error": "stopped: the state after step 2 is saved", "overrides": ["seed=2"]}
    (sweep / "1/job.json").write_text(json.dumps(record))
    assert [job.error for job in read_jobs(sweep)][:2] == [None, None]
    stopped = {**json.loads((sweep / "1/summary.json").read_text()), "interrupted": True}
    (sweep / "1/summary.json").write_text(json.dumps(stopped))
    assert [job.error for job in read_jobs(sweep)][:2] == [None, record["error"]]


def test_a_job_that_is_damaged_does_not_hide_the_others(sweep: Path) -> None:
    (sweep / "3/config.yaml").write_text("{")
    (sweep / "1/metrics.jsonl").write_text("no json\n")
    text = Parsed(sweep_page(sweep)).text
    assert "3/config.yaml" in text and "1/metrics.jsonl is damaged" in text and "4 things" not in text
    assert "3 things flagged" in text and "70.0%" in text


def test_folders_that_are_no_sweeps(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not a folder; name the folder of a sweep's jobs"):
        read_jobs(tmp_path / "nothing")
    with pytest.raises(RunError, match="holds no jobs: no folder in it has a config"):
        read_jobs(tmp_path)
    run = write_run(tmp_path / "run", 2)
    with pytest.raises(RunError, match=f"is a run: use run={run}"):
        read_jobs(run)
