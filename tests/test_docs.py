"""The code in docs/extending.md and docs/runs.md is run as it stands."""

import re
from pathlib import Path
from typing import Any

import make
import pytest
from helpers import built_of, read_json, read_lines, train, write_rewards

from dppo_cli.config.conf_tree import known_keys

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


def test_the_environment_and_the_tool_of_the_docs_answer(work: Path) -> None:
    reply, multiply = code_blocks((DOCS / "environments.md").read_text(encoding="utf-8"), "python")
    (work / "my_environment.py").write_text(reply, encoding="utf-8")
    (work / "tools.py").write_text(multiply, encoding="utf-8")
    words = ("environment=function", "environment.path=my_environment.py:reply")
    environment = built_of(*words).environment.load(make.fail)
    assert environment is not None
    prompt = make.prompt(answer="42")

    def said(text: str, turn: int) -> list[str]:
        messages = environment.begin(prompt, [{"role": "assistant", "content": text}], turn)().messages
        return [message["content"] for message in messages]

    assert (said("41", 1), said("41", 3), said("It is 42.", 1)) == (["That is not right. Try again."], [], [])
    environment = built_of("environment=tools", "environment.path=tools.py:multiply").environment.load(make.fail)
    assert environment is not None and environment.schemas[0]["function"]["name"] == "multiply"
    assert said('<tool_call>{"name": "multiply", "arguments": {"a": 6, "b": 7}}</tool_call>', 1) == ["42"]


def test_a_run_is_read_as_the_docs_read_it(model: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(model, "steps=3", "samples.groups=2", "optim.lr=0.05", "divergence.delta_low=0.001") == 0
    capsys.readouterr()
    found: dict[str, Any] = {}
    exec(code_blocks((DOCS / "runs.md").read_text(encoding="utf-8"), "python")[0], found)
    steps, *lines = capsys.readouterr().out.splitlines()
    assert steps == f"3 {read_lines(work / 'runs/last/metrics.jsonl')[-1]['reward']}"
    rows = read_lines(work / "runs/last/samples/step-3.jsonl")
    masked = [[row["tokens"][t] for t, keep in enumerate(row["keep"]) if keep is False] for row in rows]
    expected = [f"{row['score']} {row['completion']!r} {m}" for row, m in zip(rows, masked, strict=True)]
    assert lines == expected and len(lines) == 8 and any(masked)
    assert found["frame"]["step"].tolist() == [1, 2, 3]


def test_the_docs_name_every_key_of_a_sample(model: Path, work: Path) -> None:
    assert train(model, "steps=1") == 0
    table = [line for line in (DOCS / "runs.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    named = [name for line in table for name in re.findall(r"`(\w+)`", line.split("|")[1])]
    assert named == list(read_lines(work / "runs/last/samples/step-1.jsonl")[0])


def test_the_names_beside_those_of_other_tools_are_keys() -> None:
    text = (DOCS / "other_tools.md").read_text(encoding="utf-8")
    named = [
        key for row in re.findall(r"^\| (`.*?) \|", text, flags=re.MULTILINE) for key in re.findall(r"`(.*?)`", row)
    ]
    assert len(named) == 33 and set(named) <= set(known_keys("train"))
