"""Commands with an environment: whole runs of several turns, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
from disturbed import fail_at, outcome
from helpers import TINY_RUN, read_json, read_lines, train, train_words, write_rewards

from dppo_cli.cli.main import main
from dppo_cli.config.saved import SIGNATURE
from dppo_cli.rollout.local import LocalEngine

pytestmark = pytest.mark.usefixtures("work")

ENVIRONMENT = '''
def reply(messages, answer, turn, **columns):
    """Say the problem again, unless the answer is even."""
    return messages[0]["content"] if turn == 1 or int(answer) % 2 else None


def broken(messages):
    raise ValueError("no idea")


def multiply(a: int, b: int) -> int:
    """Multiply two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a * b


def whole(prompts, completions, **columns):
    """A reward that sees the conversation: share of 7s in all of it, and what it was given."""
    texts = [c if isinstance(c, str) else "".join(m["content"] for m in c) for c in completions]
    return [sum(c in "0123456789" for c in text) / max(1, len(text)) for text in texts]
'''
TURNS = (
    "environment=function",
    "environment.path=env.py:reply",
    "environment.stop=[a,e,i,o,u,'0','2','4','6','8',A,E,I,O,U,.,' ']",
    "sampling.max_new_tokens=40",
)
"""A random model seldom ends a turn by itself."""
TOOLS_TEMPLATE = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}" + tiny.CHAT_TEMPLATE


@pytest.fixture(autouse=True)
def written(work: Path) -> None:
    write_rewards(work)
    (work / "env.py").write_text(ENVIRONMENT, encoding="utf-8")


def numbers(run: str) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in row.items() if k not in ("time", "memory")} for row in read_lines(Path(run, "metrics.jsonl"))
    ]


def test_a_run_of_several_turns(model: Path) -> None:
    words = (*TURNS, "reward.path=env.py:whole", "approx=topk", "approx.k=4", "steps=3", "samples.groups=9")
    assert train(model, *words, "run_dir=one") == train(model, *words, "run_dir=two") == 0
    assert numbers("one") == numbers("two")
    for row in numbers("one"):
        assert row["turns"] > 1 and row["reply_tokens"] > 0 and row["mismatch_mean"] < 1e-6
    rows = read_lines(Path("one/samples/step-1.jsonl"))
    several = [row for row in rows if not all(row["sampled"])]
    assert several
    for row in several:
        said = "".join(text for text, sampled in zip(row["tokens"], row["sampled"], strict=True) if not sampled)
        assert said in (row["prompt"], 2 * row["prompt"], 3 * row["prompt"])
        for column in ("logp_mu", "logp_pi", "divergence", "keep"):
            assert [v is not None for v in row[column]] == row["sampled"] or row["advantage"] == 0
    assert read_json(Path("one/summary.json"))["system"]["sampled from"].endswith("; in up to 4 turns")


def test_a_run_that_was_stopped_goes_on(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*TURNS, "steps=3", "checkpoint.every=1")
    assert train(model, *words, "run_dir=whole") == 0
    with monkeypatch.context() as patched:
        fail_at(12, LocalEngine, "generate", patched)
        assert train(model, *words, "run_dir=cut") == 130
    assert main(["train", "resume=cut"]) == 0
    assert outcome(Path("cut")) == outcome(Path("whole"))


def test_two_processes(model: Path) -> None:
    words = train_words(model, *TURNS, "console=quiet", "reward.path=env.py:whole")
    assert main(["train", *words, "run_dir=one"]) == 0
    assert main(["train", *words, "run_dir=two", "hardware.processes=2"]) == 0
    for a, b in zip(numbers("two"), numbers("one"), strict=True):
        for key in ("reward", "gradient_norm", "turns", "reply_tokens", "entropy"):
            assert a[key] == pytest.approx(b[key], rel=1e-4, abs=1e-7), key


def test_evaluation_has_the_runs_environment_or_another(model: Path) -> None:
    assert train(model, *TURNS, "steps=1", "run_dir=run") == 0
    assert main(["eval", "run=run", "out=a"]) == main(["eval", "run=run", "out=b", "environment=none"]) == 0
    with_it, without = (read_lines(Path(out, "samples.jsonl")) for out in ("a", "b"))
    several = [row for row in with_it if row["messages"]]
    assert several and not any(row["messages"] for row in without)
    assert all(row["messages"][1] == {"role": "user", "content": row["prompt"]} for row in several)
    assert all(row["completion"] == row["messages"][-1]["content"] for row in several)
    assert main(["eval", "run=run", "out=c", "environment.turns=2"]) == 0
    assert {len(row["messages"]) for row in read_lines(Path("c/samples.jsonl"))} <= {0, 3}
    assert main(["compare", "run=run", "other=base", "out=d"]) == 0
    assert main(["export", "run=run", "format=merged", "out=e", "check=accuracy"]) == 0
    assert main(["eval", f"model.path={model}", "data=arithmetic", "data.eval_problems=4", "out=f", *TURNS]) == 0
    assert any(row["messages"] for row in read_lines(Path("f/samples.jsonl")))


def test_tools_are_shown_to_the_model(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(model, "own")
    Path("own/chat_template.jinja").write_text(TOOLS_TEMPLATE, encoding="utf-8")
    words = ["environment=tools", "environment.path=env.py:multiply", "prompt.template=chat"]
    assert main(["data", *train_words(Path("own")), *words, "rows=1", "json=true", "check=0"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["prompt"].startswith("<multiply><user>")
    assert train(Path("own"), *words, "steps=1", "run_dir=run") == 0
    (first, *_) = read_lines(Path("run/samples/step-1.jsonl"))
    assert first["prompt"].startswith("<multiply><user>")
    assert main(["eval", "run=run", "out=a"]) == 0


def test_difficulty_is_measured_with_it(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*train_words(model, "reward.path=env.py:whole"), *TURNS, "difficulty=true", "problems=2", "check=0"]
    assert main(["data", *words, "json=true"]) == 0
    assert json.loads(capsys.readouterr().out)["difficulty"]["problems"] == 2


def test_sample_shows_what_is_said_in_between(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (Path.cwd() / "hint.py").write_text("def reply(messages, answer):\n    return 'no' if not answer else None\n")
    words = [
        f"model.path={model}",
        "text=1+2=",
        *TURNS,
        "environment.path=hint.py:reply",
        "sampling.max_new_tokens=200",
    ]
    assert main(["sample", *words, "environment.turns=3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\n[user] no\n") == 2
    assert main(["sample", *words, "environment.turns=3", "json=true"]) == 0
    ((found,),) = json.loads(capsys.readouterr().out)["samples"].values()
    assert [m["role"] for m in found["messages"]] == ["assistant", "user", "assistant", "user", "assistant"]
    assert "\n[user] no\n".join(m["content"] for m in found["messages"] if m["role"] == "assistant") == shown[:-1]
    assert found["text"] == found["messages"][-1]["content"]
    assert main(["sample", *words, "environment.role=assistant", "json=true"]) == 0
    ((found,),) = json.loads(capsys.readouterr().out)["samples"].values()
    assert found["messages"] == [] and "no" in found["text"]


def test_what_a_run_of_somebody_else_may_name(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Our own calculator; and what is typed now, a list of tools, too."""
    words = [*TINY_RUN, "data.train_problems=32", f"model.path={model}", "steps=1", "run_dir=run"]
    assert main(["train", *words, "environment=calculator"]) == 0
    config = Path("run/config.yaml")
    config.write_text(config.read_text().rpartition(SIGNATURE)[0])
    assert main(["eval", "run=run", "out=a"]) == 0
    other = config.read_text().replace("environment.calculator:reply", "calls.worker:find_function")
    config.write_text(other)
    assert main(["eval", "run=run", "out=b"]) == 2
    assert "names code that would run: environment.path=dppo_cli.calls.worker:find_fu" in capsys.readouterr().err
    shutil.copytree(model, "own")
    Path("own/chat_template.jinja").write_text(TOOLS_TEMPLATE, encoding="utf-8")
    config.write_text(other.replace(str(model), str(Path("own").resolve())))
    words = ["environment=tools", "environment.path=[env.py:multiply]", "prompt.template=chat"]
    assert main(["eval", "run=run", "out=c", *words]) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["environment=tools", "environment.path=env.py:multiply"],
            "add prompt.template=chat, or answer plain prompts by",
        ),
        (
            ["environment=tools", "environment.path=env.py:multiply", "prompt.template=chat"],
            "has no place for tools; use a model that was made for them, or environment=function",
        ),
        ([*TURNS, "environment.path=env.py:broken"], "failed on problem"),
        (["environment=function"], "environment.path is not set; add environment.path=..."),
        (
            ["environment=function", "environment.path=env.py:repyl"],
            "there is no function 'repyl'; did you mean 'reply'",
        ),
        (["environment=functoin"], "there is no environment=functoin; did you mean 'function'"),
        (
            ["environment.turns=3"],
            "environment.turns is a key of environment=calculator, function and tools, of which none",
        ),
        ([*TURNS, "environment.role=boss"], "environment.role=boss"),
        ([*TURNS, "rollout=vllm", "rollout.ahead=1"], "use rollout.ahead=0 with it"),
    ],
)
def test_what_cannot_work_is_said_in_a_line(
    words: list[str], text: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(model, *words, "console=quiet", "run_dir=run") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dppo: ")]
    assert text in line
