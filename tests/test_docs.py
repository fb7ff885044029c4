"""docs/extending.md is run as it stands."""

import re
from pathlib import Path

import pytest
from helpers import read_json, read_lines, train, write_rewards

DOCS = Path(__file__).parent.parent / "docs"


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_a_divergence_is_added_with_one_class_and_one_yaml(
    tmp_path: Path, tiny_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rewards(tmp_path)
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    (tmp_path / "my_divergences.py").write_text(code_blocks(text, "python")[0], encoding="utf-8")
    (tmp_path / "my_conf" / "divergence").mkdir(parents=True)
    (tmp_path / "my_conf/divergence/hellinger.yaml").write_text(code_blocks(text, "yaml")[0], encoding="utf-8")
    words = ["--config-dir", "my_conf", "divergence=hellinger", "run_dir=run"]
    for approx in ("binary", "topk", "full"):
        run = tmp_path / f"run-{approx}"
        status = train(tiny_models["llama3"], *words[:-1], f"approx={approx}", f"run_dir={run}", "optim.lr=0.05")
        assert status == 0
        steps = read_lines(run / "metrics.jsonl")
        assert any(0 < step["divergence_p100"] <= 1 for step in steps)
        assert read_json(run / "summary.json")["steps"] == 2


def test_the_reward_of_the_docs_scores() -> None:
    found: dict[str, object] = {}
    exec(code_blocks((DOCS / "extending.md").read_text(encoding="utf-8"), "python")[1], found)
    score = found["score"]
    assert callable(score)
    assert score(["1+1="] * 2, ["it is 2", "3"], answer=["2", "2"]) == [1.0, 0.0]
