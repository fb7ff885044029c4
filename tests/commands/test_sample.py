"""`dppo sample`: base and trained policy answer one prompt, or hold a conversation."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TINY_RUN
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dppo_cli.cli.main import main
from dppo_cli.commands import sample
from dppo_cli.commands.beside import shown
from dppo_cli.config.saved import SIGNATURE
from dppo_cli.rollout.engine import derive_seed
from dppo_cli.types import Prompt

Sampled = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def run(tiny_models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has moved far, so that base and trained policy differ. Shared: read, never written."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        (folder / "rewards.py").write_text(
            "def odd(completions, **columns):\n    return [sum(map(ord, c[0]['content'])) % 97 for c in completions]\n"
        )
        words = ["data.train_problems=32", f"model.path={tiny_models['llama3']}", "optim.lr=0.1", "run_dir=run"]
        words += ["reward=function", "reward.path=rewards.py:odd", "prompt.template=chat", "prompt.system=Hi."]
        assert main(["train", *TINY_RUN, *words]) == 0
    return folder / "run"


@pytest.fixture
def sampled(capsys: pytest.CaptureFixture[str]) -> Sampled:
    """`sampled("run=run", "text=1+1=")`: the JSON objects on stdout, on which there is nothing else."""

    def command(*words: str) -> list[dict[str, Any]]:
        capsys.readouterr()
        assert main(["sample", *words, "json=true"]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return command


def texts(turn: dict[str, Any], column: str) -> list[str]:
    return [found["text"] for found in turn["samples"][column]]


def stdin(monkeypatch: pytest.MonkeyPatch, data: str | bytes) -> None:
    raw = data if isinstance(data, bytes) else data.encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))


def by_hand(folder: Path, prompt: str, new: int, seed: int, warpers: list[Any]) -> str:
    """A token at a time, with transformers alone: `warpers` are applied to the logits, then one is drawn."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    start = ids.shape[1]
    torch.manual_seed(seed)
    for _ in range(new):
        with torch.no_grad():
            logits = model(ids).logits[:, -1].float()
        for warper in warpers:
            logits = warper(ids, logits)
        token = torch.multinomial(logits.softmax(-1), 1) if warpers else logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
        if int(token) == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[0, start:], skip_special_tokens=True))


# What is sampled


def test_base_and_trained_answer_one_prompt(run: Path, work: Path, sampled: Sampled) -> None:
    words = [f"run={run}", "prompt.template=plain", "text=1+2=", "samples=3", "sampling.max_new_tokens=8"]
    (turn,) = sampled(*words)
    assert (turn["prompt"], turn["run"], turn["seed"]) == ("1+2=", str(run), 1)
    assert len(texts(turn, "base")) == len(texts(turn, "trained")) == 3
    assert texts(turn, "base") != texts(turn, "trained")
    assert len(set(texts(turn, "base"))) > 1
    for found in turn["samples"]["base"] + turn["samples"]["trained"]:
        assert 1 <= found["tokens"] <= 8 and (found["finished"] or found["tokens"] == 8)
    # The same command gives the same; the first samples do not depend on how many there are.
    (again,) = sampled(*words, "samples=2")
    assert texts(again, "base") == texts(turn, "base")[:2] and texts(again, "trained") == texts(turn, "trained")[:2]
    (other,) = sampled(*words, "seed=2")
    assert texts(other, "base") != texts(turn, "base")


def test_the_base_is_the_plain_model(run: Path, model: Path, work: Path, sampled: Sampled) -> None:
    words = ["prompt.template=plain", "text=1+2=", "samples=3", "sampling.max_new_tokens=8"]
    (of_run,) = sampled(f"run={run}", *words)
    (plain,) = sampled(f"model.path={model}", "hardware=cpu", *words)
    assert texts(plain, "model") == texts(of_run, "base")
    assert (plain["run"], list(plain["samples"])) == (None, ["model"])


@pytest.mark.parametrize(
    ("words", "warpers"),
    [
        (["sampling.temperature=0"], []),
        (["sampling.temperature=0.5"], [TemperatureLogitsWarper(0.5)]),
        (["sampling.top_k=5"], [TopKLogitsWarper(5)]),
        (["sampling.top_p=0.6"], [TopPLogitsWarper(0.6)]),
    ],
    ids=lambda value: value[0] if value and isinstance(value[0], str) else None,
)
def test_tokens_are_drawn_as_the_keys_say(
    words: list[str], warpers: list[Any], model: Path, work: Path, sampled: Sampled
) -> None:
    """From the tempered distribution, cut off as asked, and from nothing else."""
    (turn,) = sampled(f"model.path={model}", "text=1+2=", "sampling.max_new_tokens=12", *words)
    expected = by_hand(model, "1+2=", 12, derive_seed(derive_seed(1, 0), 0), warpers)
    assert texts(turn, "model") == [expected] and expected


def test_the_models_own_generation_settings_play_no_part(model: Path, work: Path, sampled: Sampled) -> None:
    """Many models bring a repetition penalty or a top_k along."""
    words = ["text=1+2=", "sampling.max_new_tokens=12", "samples=2"]
    (plain,) = sampled(f"model.path={model}", *words)
    shutil.copytree(model, work / "own")
    own = json.loads((model / "generation_config.json").read_text()) | {
        "repetition_penalty": 5.0,
        "top_k": 1,
        "do_sample": True,
    }
    (work / "own/generation_config.json").write_text(json.dumps(own))
    (found,) = sampled("model.path=own", *words)
    assert texts(found, "model") == texts(plain, "model")


def test_what_is_not_said_is_the_runs(run: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(sample, "run_sample", lambda config, text: seen.append(config) or {})
    assert main(["sample", f"run={run}", "text=a"]) == 0
    assert main(["sample", f"run={run}", "text=a", "prompt.template=chat", "sampling.top_k=3"]) == 0
    assert main(["sample", "model.path=m", "text=a", "hardware.head_chunk=7"]) == 0
    of_run, changed, plain = seen
    assert (of_run.prompt.template, of_run.prompt.system) == ("chat", "Hi.")
    assert (of_run.sampling.max_new_tokens, of_run.sampling.temperature, of_run.sampling.top_k) == (4, 1.0, 0)
    assert (of_run.hardware.device, of_run.adapter.r) == ("cpu", 4)
    assert (changed.prompt.template, changed.prompt.system, changed.sampling.top_k) == ("chat", None, 3)
    assert (plain.prompt.template, plain.adapter, plain.sampling.max_new_tokens) == ("plain", None, 256)
    assert (plain.hardware.device, plain.hardware.head_chunk) == ("auto", 7)


def test_a_text_that_ends_a_response(model: Path, work: Path, sampled: Sampled) -> None:
    words = [f"model.path={model}", "text=1+2=", "sampling.max_new_tokens=12", "sampling.temperature=0"]
    (free,) = sampled(*words)
    (whole,) = texts(free, "model")
    assert whole[3] not in whole[:3] and whole[3].isalnum()
    (turn,) = sampled(*words, f"sampling.stop=['{whole[3]}']")
    (found,) = turn["samples"]["model"]
    assert (found["text"], found["finished"]) == (whole[:3], True)
    # It ends with the very token that completes the text.
    (shorter,) = sampled(*words[:2], *words[3:], f"sampling.max_new_tokens={found['tokens'] - 1}")
    assert shorter["samples"]["model"] == [{**found, "tokens": found["tokens"] - 1, "finished": False}]


def test_a_run_of_somebody_else_runs_no_code_unless_trusted(
    run: Path, work: Path, sampled: Sampled, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(run, work / "theirs")
    config = work / "theirs/config.yaml"
    config.write_text(config.read_text(encoding="utf-8").partition(SIGNATURE)[0], encoding="utf-8")
    assert main(["sample", "run=theirs", "text=1", "json=true"]) == 2
    assert "names code that would run: reward.path=" in capsys.readouterr().err
    (turn,) = sampled("run=theirs", "text=1", "trust=true")
    assert turn["prompt"] == "1"


# Conversations


def test_prompts_come_from_a_pipe(model: Path, work: Path, sampled: Sampled, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line each, until an empty one. Plain prompts know nothing of each other."""
    words = [f"model.path={model}", "sampling.temperature=0", "sampling.max_new_tokens=6"]
    stdin(monkeypatch, "1+2=\r\n[bold]3+4=\n\n5+6=\n")
    first, second = sampled(*words)
    assert (first["prompt"], second["prompt"]) == ("1+2=", "[bold]3+4=")
    (alone,) = sampled(*words, "text=[bold]3+4=")
    assert texts(second, "model") == texts(alone, "model")


def test_a_conversation_keeps_what_was_said(
    run: Path, work: Path, sampled: Sampled, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each column has its own: base and trained policy go on from what they themselves said."""
    real, asked = sample._encode, []

    def encode(policy: Any, prompting: Any, said: Any, text: str) -> Prompt:
        prompt = real(policy, prompting, said, text)
        asked.append(policy.tokenizer.decode(list(prompt.token_ids)))
        return prompt

    monkeypatch.setattr(sample, "_encode", encode)
    stdin(monkeypatch, "one\ntwo\n")
    first, second = sampled(f"run={run}")
    begin = "<system>Hi.\n<user>one\n<a>"
    base, trained = texts(first, "base")[0], texts(first, "trained")[0]
    assert base != trained
    assert asked[:2] == [begin, begin]
    expected = [f"<system>Hi.\n<user>one\n<assistant>{text}\n<user>two\n<a>" for text in (base, trained)]
    assert asked[2:] == expected
    assert second["prompt"] == "two"


def test_the_terminal_is_asked_for_prompts_on_stderr(
    model: Path, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stdin(monkeypatch, "1+2=\n")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    words = [f"model.path={model}", "sampling.temperature=0", "sampling.max_new_tokens=3"]
    assert main(["sample", *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == "> > "
    assert captured.out == f"{by_hand(model, '1+2=', 3, 0, [])}\n"
    # Who is asked may leave without a word.
    stdin(monkeypatch, "")
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["sample", *words]) == 0


def test_text_is_shown_as_it_is_sampled(run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run={run}", "text=1+2=", "sampling.max_new_tokens=6"]
    assert main(["sample", *words, "samples=2", "json=true"]) == 0
    turn = json.loads(capsys.readouterr().out)
    assert main(["sample", *words, "samples=2"]) == 0
    lines = [f"{name} {i + 1}: {shown(t)}\n" for name in ("base", "trained") for i, t in enumerate(texts(turn, name))]
    assert capsys.readouterr().out == "".join(lines)
    assert main(["sample", *words]) == 0
    assert (
        capsys.readouterr().out
        == f"base: {shown(texts(turn, 'base')[0])}\ntrained: {shown(texts(turn, 'trained')[0])}\n"
    )
