"""`dppo train` with no arguments learns what the README says it learns."""

from pathlib import Path

import pytest
from helpers import read_json

from dppo_cli.cli.main import main


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_default_run_reaches_eighty_percent(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", f"seed={seed}", "run_dir=run"]) == 0
    summary = read_json(tmp_path / "run/summary.json")
    assert 0.25 <= summary["eval_before"] <= 0.40
    assert summary["eval_after"] >= 0.80
