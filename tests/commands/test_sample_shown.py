"""How `dppo sample` shows what was sampled, and what it refuses."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_cli.cli.main import as_hydra_has_it, main
from dppo_cli.commands import sample
from dppo_cli.commands.beside import Beside, shown

Refused = Callable[..., str]


def stdin(monkeypatch: pytest.MonkeyPatch, data: str | bytes) -> None:
    raw = data if isinstance(data, bytes) else data.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


def test_in_a_terminal_they_stand_beside_each_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "xterm")
    with Beside(["base", "trained"], 1, silent=False) as view:
        view.begin("base", 0)
        for text in ("[red]forty ", "six\x1b[2J"):
            view.add(text)
        view.end("[red]forty six\x1b[2J")
        view.begin("trained", 0)
        view.end("46")
    out = capsys.readouterr().out
    (row,) = {line for line in out.splitlines() if "46" in line}
    assert row.split() == ["│", "[red]forty", "six\\x1b[2J", "│", "46", "│"]
    assert "\x1b[2J" not in out


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\nc", "a\tb\nc"),
        ("\x1b[31m[red]x", "\\x1b[31m[red]x"),
        ("\r\x07\x9b", "\\r\\x07\\x9b"),
        ("a\u202eb\u2028", "a\\u202eb\\u2028"),
        ("日本 é 👩‍👧", "日本 é 👩‍👧"),
    ],
)
def test_hostile_text_is_shown_as_text(text: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(text) == expected
    with Beside(["model"], 1, silent=False) as view:
        view.begin("model", 0)
        view.add(text)
        view.end(text)
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.parametrize(
    "text", ["12+34=", "it's, a [list] {of: things}", "end\\", "\\'", "${oc.env:HOME}", "\\${x}", "null", '"q"', "a\nb"]
)
def test_text_is_taken_as_it_is_typed(text: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sample, "run_sample", lambda config, yaml: seen.append(config.text) or {})
    assert main(["sample", "model.path=m", f"text={text}"]) == 0
    assert seen == [text]
    # Of commands that have no such key nothing is changed.
    assert as_hydra_has_it("train", f"text={text}") == f"text={text}"


def test_warnings_are_on_stderr(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = sample.load_policy

    def load(*args: Any, warn: Callable[[str], None], **options: Any) -> Any:
        warn("[b]odd")
        return real(*args, warn=warn, **options)

    monkeypatch.setattr(sample, "load_policy", load)
    assert main(["sample", f"model.path={model}", "text=1", "sampling.max_new_tokens=2", "json=true"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["prompt"] == "1"
    assert captured.err == "warning: [b]odd\n"


# Mistakes


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    def command(*words: str) -> str:
        assert main(["sample", *words]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    return command


def test_mistakes_in_words(refused: Refused, work: Path) -> None:
    assert "name what to sample: a run" in refused("text=a")
    assert "one of them" in refused("text=a", "run=r", "model.path=m")
    assert "run=runs/last points nowhere" in refused("run=runs/last", "text=a")
    assert "text is empty" in refused("model.path=m", "text=")
    assert "text is empty" in refused("model.path=m", "text= \n ")
    for samples in (0, 10_001):
        rule = f"samples={samples} breaks the rule 1 <= samples <= 10000"
        assert rule in refused("model.path=m", "text=a", f"samples={samples}")
    assert "samples=2 would make a conversation" in refused("model.path=m", "prompt.template=chat", "samples=2")
    assert "temperature=inf must be a finite number" in refused("model.path=m", "text=a", "sampling.temperature=inf")


def test_mistakes_in_prompts(refused: Refused, model: Path, work: Path, monkeypatch: Any) -> None:
    plain = f"model.path={model}"
    assert "the prompt has 4 tokens; with sampling.max_new_tokens=256 that is more than the 256 positions" in refused(
        plain, "text=1+2="
    )
    assert "the prompt '\\udcff1' is not UTF-8 text" in refused(plain, "text=\udcff1")
    for data, says in (
        ("", "there is no prompt"),
        ("\n1+1=\n", "there is no prompt"),
        (b"\xff\xfe1\n", "what stdin holds is not UTF-8 text"),
        ("1" * (sample.LONGEST_LINE + 1), "a line of stdin has more than 1,048,576 characters"),
    ):
        stdin(monkeypatch, data)
        assert says in refused(plain)
    monkeypatch.setattr("sys.stdin", None)
    assert "there is no prompt" in refused(plain)


def test_a_tokenizer_without_a_chat_template_and_one_that_refuses(
    refused: Refused, model: Path, work: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no chat template; use prompt.template=plain" in refused(
        "model.path=embedded:arithmetic_1m", "prompt.template=chat", "text=1"
    )
    shutil.copytree(model, work / "own")
    template = "{% if messages | length > 1 %}{{ raise_exception('one\nonly') }}{% endif %}1"
    (work / "own/chat_template.jinja").write_text(template)
    stdin(monkeypatch, "1\n2\n")
    assert main(["sample", "model.path=own", "prompt.template=chat", "sampling.max_new_tokens=2"]) == 2
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1  # the first turn
    assert captured.err == f"dppo: the chat template of {work / 'own'} refuses the conversation: one only\n"


def test_a_policy_that_is_broken(model: Path, work: Path, monkeypatch: Any, capsys: Any) -> None:
    real = sample.load_policy

    def load(*args: Any, **options: Any) -> Any:
        policy = real(*args, **options)
        policy.model.model.norm.weight.data.fill_(torch.nan)
        return policy

    monkeypatch.setattr(sample, "load_policy", load)
    for temperature in (0, 1):
        words = [f"sampling.temperature={temperature}", "sampling.max_new_tokens=2"]
        assert main(["sample", f"model.path={model}", "text=1", *words]) == 1
        assert capsys.readouterr().err == "dppo: the logits of the policy are NaN: its weights are broken\n"
