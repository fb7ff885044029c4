"""`dppo train -m`: a job for each combination, a table at the end, and jobs that fail."""

from pathlib import Path

import pytest
from helpers import read_json, train
from omegaconf import OmegaConf

WEIGHTS = "adapter/adapter_model.safetensors"

pytestmark = pytest.mark.usefixtures("work")


def test_a_sweep_prints_a_table_and_makes_a_run_folder_per_job(
    model: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, "-m", "divergence=tv,kl", "steps=1") == 0
    (sweep,) = (work / "sweeps").iterdir()
    assert sorted(p.name for p in sweep.iterdir()) == ["0", "1", "multirun.yaml"]
    targets = [OmegaConf.load(sweep / job / "config.yaml").divergence._target_ for job in ("0", "1")]
    assert [t.rpartition(".")[2] for t in targets] == ["TotalVariation", "KL"]
    for job in ("0", "1"):
        summary, record = read_json(sweep / job / "summary.json"), read_json(sweep / job / "job.json")
        assert summary["steps"] == 1
        assert (record["number"], record["status"], record["error"]) == (int(job), 0, None)
        assert record["summary"] == summary
        assert (sweep / job / WEIGHTS).is_file()
    assert (work / "runs/last").resolve() == sweep / "1"
    table = capsys.readouterr().out.split(" sweep ")[1]
    assert "divergence=tv" in table.replace("\n", "") and "divergence=kl" in table.replace("\n", "")
    assert table.count("0.0%") == 4


def test_a_job_that_fails_does_not_end_a_sweep(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, "-m", "optim.lr=-1,0.001", "steps=1", "run_dir=sweep") == 2
    assert [p.name for p in (work / "sweep/0").iterdir()] == ["job.json"], "how it ended, and no run"
    record = read_json(work / "sweep/0/job.json")
    assert (record["status"], record["error"]) == (2, "optim.lr=-1.0 breaks the rule lr > 0")
    assert read_json(work / "sweep/1/summary.json")["steps"] == 1
    captured = capsys.readouterr()
    assert captured.err == "dppo: 1 of 2 jobs failed; job 0: optim.lr=-1.0 breaks the rule lr > 0\n"
    assert "failed" in captured.out


def test_a_sweep_in_which_every_job_fails_leaves_nothing(model: Path, work: Path) -> None:
    assert train(model, "-m", "optim.lr=-1,-2", "run_dir=sweep") == 2
    assert not (work / "sweep").exists()
    assert train(model, "-m", "approx=binary,trinary", "run_dir=sweep") == 2
    assert not (work / "sweep").exists()
