"""Runs whose rollouts come from a server."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import vllm_server
from helpers import TINY_RUN, main, read_json, read_lines, train
from vllm_server import VLLM

from dppo_cli.config.saved import SIGNATURE

EXACT = ("reward", "entropy", "gradient_norm", "shift_mean")
PROMPTS = ["data.train_problems=32", "data.eval_problems=4"]


@pytest.fixture
def server(model: Path) -> Iterator[VLLM]:
    with vllm_server.serving(model) as found:
        yield found


@pytest.fixture
def words(server: VLLM) -> list[str]:
    return ["rollout=vllm", f"rollout.url={server.url}", "rollout.patience=0", "optim.lr=0.01"]


def test_training(model, work, server, words, capsys) -> None:
    """mu is that of the policy of each step, binary and top-K."""
    for approx in ("binary", "topk"):
        assert train(model, *words, f"approx={approx}", "run_dir=" + approx) == 0
        rows = read_lines(work / approx / "metrics.jsonl")
        assert len(rows) >= 2
        assert all(row["mismatch_mean"] < 1e-5 and row["gradient_norm"] > 0 for row in rows)
        summary = read_json(work / approx / "summary.json")
        assert summary["system"]["sampled from"].startswith(f"vLLM 0.32.0 at {server.url}, base with the adapter")
    assert server.adapters() == []
    assert f"sampling from vLLM 0.32.0 at {server.url}" in capsys.readouterr().out


def test_a_run_goes_on(model, work, server, words) -> None:
    """With the same tokens, where the server gives the same."""
    assert train(model, *words, "run_dir=whole", "steps=4") == 0
    assert train(model, *words, "run_dir=parts", "steps=2") == 0
    assert main(["train", "resume=parts", "steps=4"]) == 0
    whole, parts = (read_lines(work / name / "metrics.jsonl") for name in ("whole", "parts"))
    for one, other in zip(whole, parts, strict=True):
        assert [one[key] for key in EXACT] == [other[key] for key in EXACT]


def test_a_run_goes_on_with_a_server_elsewhere(model, work, server, words) -> None:
    assert train(model, *words, "run_dir=run", "steps=2") == 0
    with vllm_server.serving(model) as other:
        moved = ["rollout=vllm", f"rollout.url={other.url}", "rollout.patience=3", "rollout.concurrent_prompts=2"]
        assert main(["train", "resume=run", "steps=4", *moved]) == 0
        assert other.bodies("/completions")
    assert main(["train", "resume=run", "steps=6", "rollout=vllm", "rollout.seeded=false"]) == 2


def dies_after(steps: int, server: VLLM) -> None:
    """The server samples for no later step."""
    load, loaded = server.load, len(server.bodies("/load_lora_adapter"))

    def dies(body):
        if len(server.bodies("/load_lora_adapter")) == loaded + steps + 1:
            server.refuse["/completions"] = [(503, "")] * 1000
        return load(body)

    server.load = dies


def test_a_server_that_dies_ends_a_run_that_can_go_on(model, work, server, words, capsys) -> None:
    assert train(model, *words, "run_dir=whole", "steps=3") == 0
    dies_after(2, server)
    assert train(model, *words, "run_dir=run", "steps=3") == 2
    assert "the state after step 2 is saved; to go on: dppo train resume=run" in capsys.readouterr().err
    server.refuse.clear()
    assert main(["train", "resume=run"]) == 0
    assert (
        read_json(work / "run/summary.json")["adapter_sha256"]
        == read_json(work / "whole/summary.json")["adapter_sha256"]
    )


def test_a_server_that_is_away_for_a_moment(model, work, server, words, capsys) -> None:
    """The run says so when it happens, and keeps it."""
    load = server.load

    def away(body):
        if len(server.bodies("/load_lora_adapter")) == 2:
            server.refuse["/completions"] = [(503, "")] * 2
        return load(body)

    server.load = away
    assert train(model, *words, "rollout.patience=20", "run_dir=run", "steps=2") == 0
    said = f"the vLLM server at {server.url} does not answer (503); waiting 20 seconds for it"
    assert f"warning: {said}" in capsys.readouterr().out
    assert read_json(work / "run/summary.json")["warnings"] == [said]


def test_sampling_ahead(model, work, server, words, capsys) -> None:
    """The same problems; from the second step on samples are of the policy one step before, and are known as that."""
    more = ["optim.lr=0.05", "order=solve_rate", "eval.every=2", "checkpoint.every=1"]
    assert train(model, *words, *more, "run_dir=ahead", "steps=5", "rollout.ahead=1") == 0
    rows = read_lines(work / "ahead/metrics.jsonl")
    assert [row["staleness"] for row in rows] == [0, 1, 1, 1, 1]
    assert rows[0]["mismatch_mean"] < 1e-5 < 1e-3 < min(row["mismatch_mean"] for row in rows[1:])
    assert [row["time"]["rollout_tokens_per_second"] for row in rows] == [None] * 5
    assert "the mismatch between rollout engine and trainer grew" not in capsys.readouterr().out
    report = main(["report", "run=ahead", "out=ahead.html"])
    assert report == 0


def test_a_run_ahead_goes_on(model, work, server, words) -> None:
    """With the problems that were begun, sampled anew."""
    ahead = [*words, "rollout.ahead=1", "samples.every=1", "samples.groups=2"]
    assert train(model, *ahead, "run_dir=whole", "steps=4") == 0
    dies_after(1, server)  # What step 2 trains on has begun before.
    assert train(model, *ahead, "run_dir=parts", "steps=4") == 2
    server.refuse.clear()
    assert main(["train", "resume=parts"]) == 0
    assert [row["staleness"] for row in read_lines(work / "parts/metrics.jsonl")] == [0, 1, 0, 1]

    def problems(run: str) -> list[list[int]]:
        files = sorted((work / run / "samples").glob("step-*.jsonl"), key=lambda path: int(path.stem[5:]))
        return [[row["problem"] for row in read_lines(path)] for path in files]

    assert problems("parts") == problems("whole")


def test_processes_train_and_one_asks(model, work, server, words) -> None:
    assert train(model, *words, "run_dir=one", "steps=2") == 0
    asked = len(server.bodies("/load_lora_adapter"))
    assert train(model, *words, "run_dir=two", "steps=2", "hardware.processes=2") == 0
    assert len(server.bodies("/load_lora_adapter")) == 2 * asked
    for one, two in zip(*(read_lines(work / name / "metrics.jsonl") for name in ("one", "two")), strict=True):
        assert two["reward"] == one["reward"]
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-5)


def test_commands_on_such_a_run(model, work, server, words, capsys) -> None:
    """Evaluations ask the server, too, unless told otherwise; exports, samples and plans need none."""
    assert train(model, *words, "run_dir=run", "steps=2") == 0
    asked = len(server.asked)
    assert main(["eval", "run=run", *PROMPTS[1:], "out=there"]) == 0
    assert len(server.asked) > asked
    asked = len(server.asked)
    assert main(["eval", "run=run", "rollout=local", *PROMPTS[1:], "out=here"]) == 0
    assert main(["export", "run=run", "format=merged"]) == 0
    assert main(["sample", "run=run", "text=1+2=", "samples=2"]) == 0
    capsys.readouterr()
    assert main(["plan", *words, f"model.path={model}", "reward=exact", "prompt_tokens=8"]) == 0
    shown = capsys.readouterr().out
    assert "servers, not planned" in shown
    assert "sampling by servers not counted" in " ".join(shown.replace("│", " ").split())
    assert "KV cache" not in shown
    assert len(server.asked) == asked
    first, second = (read_json(work / name / "summary.json") for name in ("there", "here"))
    assert first["accuracy"] is not None and second["accuracy"] is not None


def test_difficulty_of_problems(model, work, server, words, capsys) -> None:
    more = [f"model.path={model}", *PROMPTS, "reward=exact", "difficulty=true", "problems=2", "check=0"]
    assert main(["data", *words, *more, "sampling.max_new_tokens=4", "batch.samples_per_prompt=2"]) == 0
    assert {body["n"] for body in server.bodies("/completions")[2:]} == {2}


def test_a_secret_that_somebody_elses_run_names_is_not_sent(model, work, server, words, monkeypatch, capsys) -> None:
    """To an address that the run names, too."""
    monkeypatch.setenv("MINE", "sesame")
    plain = ["train", *TINY_RUN, "data.train_problems=32", f"model.path={model}", *words, "steps=1", "run_dir=run"]
    assert main([*plain, "rollout.api_key_env=MINE"]) == 0
    config = work / "run/config.yaml"
    config.write_text(config.read_text().rpartition(SIGNATURE)[0])
    asked = len(server.asked)
    capsys.readouterr()
    for command in ("eval", "export", "sample text=1"):
        assert main([*command.split(), "run=run"]) == 2
        said = "names a secret that would be sent: rollout.api_key_env=MINE. Read it, then add trust=true"
        assert said in capsys.readouterr().err
    assert len(server.asked) == asked
    assert main(["eval", "run=run", "rollout.api_key_env=MINE", "out=named"]) == 0
    assert main(["eval", "run=run", "trust=true", "out=trusted"]) == 0
