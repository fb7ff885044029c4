"""What the benchmarks compute from what they measure, and that each script still works with the package."""

import json
import math
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import make
import pytest
import torch
from benchmark_scripts import SCRIPTS
from helpers import composed
from omegaconf import OmegaConf

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.config.build import build


@pytest.fixture
def tiny_benchmark(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: Path) -> None:
    """The scripts work on a tiny model, and below `tmp_path`."""
    monkeypatch.setattr(script("measure"), "BUILD", tmp_path)
    for name in ("measure", "step", "rollout", "floor"):
        monkeypatch.setattr(script(name), "smollm2", lambda: model)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_imports(name: str, script: Any) -> None:
    assert script(name).__doc__


def test_a_spread_is_minimum_median_and_maximum(script: Any) -> None:
    spread = script("measure").Spread.of([5.0, 1.0, 2.0])
    assert (spread.low, spread.median, spread.high) == (1.0, 2.0, 5.0)
    assert str(spread) == "2 (1 to 5)"


def test_a_peak_that_may_be_the_starting_process_own_is_none(script: Any, monkeypatch: Any, tmp_path: Path) -> None:
    measure = script("measure")
    monkeypatch.setattr(measure, "BUILD", tmp_path)
    held = bytearray(b"1") * 2**28
    assert math.isnan(measure.run([sys.executable, "-c", "pass"]).peak_gib)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    larger = measure.run([sys.executable, "-c", f"bytearray(b'1') * ({peak} + 2**28)"]).peak_gib
    assert peak + len(held) < larger * 2**30 < peak + 2**29


def test_the_work_of_a_step_composes(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    step = script("step")
    monkeypatch.setattr(step, "smollm2", lambda: tmp_path)
    monkeypatch.setattr(step, "sums", lambda: tmp_path / "sums.jsonl")
    node = OmegaConf.create(OmegaConf.to_container(composed("train", *step.work(64, "approx=topk"))))
    config = build(TrainConfig, node)
    assert config.batch.updates_per_step == 1 and config.sampling.max_new_tokens == 64
    assert (config.adapter.r, config.adapter.alpha, config.optim.lr) == (16, 32, 1e-5)


@pytest.mark.parametrize(
    ("arguments", "work", "peer_precision"),
    [
        ((64,), "step at 64 new tokens, binary, against TRL 1.8.0", []),
        ((64, "topk"), "step at 64 new tokens, top-K, against TRL 1.8.0", []),
        ((64, "binary", "bfloat16"), "step at 64 new tokens, binary, both in bfloat16, against TRL 1.8.0", ["--bf16"]),
        ((256,), "step at 256 new tokens, binary, against TRL 1.8.0", []),
    ],
)
def test_the_table_shows_each_step_against_the_peer(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: Any, work: str, peer_precision: list[str]
) -> None:
    step, measure, table = script("step"), script("measure"), script("table")
    asked: list[str] = []
    ours = {"time": {"total": 10.0, "rollout": 6.0, "update": 4.0}, "response_tokens": 37.0, "skipped": 0.5}

    def peer(*args: Any, python: Path) -> Any:
        asked.extend(args)
        return {"seconds": [99.0, 40.0, 50.0, 60.0], "response_tokens": [37.0] * 4}, measure.Finished(1.0, 4.0, "")

    monkeypatch.setattr(measure, "BUILD", tmp_path)
    monkeypatch.setattr(step, "smollm2", lambda: tmp_path)
    monkeypatch.setattr(step, "peer_python", lambda: tmp_path)
    monkeypatch.setattr(step, "ours", lambda *_: ([ours] * 6, measure.Finished(1.0, 2.0, "")))
    monkeypatch.setattr(step, "run_json", peer)
    monkeypatch.setattr(step, "has_onednn", lambda *_: True)
    step.against_peer(*arguments)
    assert [a for a in asked if a == "--bf16"] == peer_precision
    shown = {name: text for name, text, _ in table.rows(table.read(tmp_path / "results"))}
    assert shown.pop(work) == (
        "5 (4 to 6) times faster: 10 s (10 to 10) against 50 s (40 to 60); "
        "memory 0.50 of the peer's: 2.00 against 4.00 GiB; 50% of our samples skipped"
    )
    assert set(shown.values()) == {"not measured"}


def test_the_pair_in_bfloat16_is_not_run_where_the_processor_has_none(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step, measure, table = script("step"), script("measure"), script("table")
    monkeypatch.setattr(measure, "BUILD", tmp_path)
    monkeypatch.setattr(step, "has_onednn", lambda _, dtype: dtype == torch.float32)
    monkeypatch.setattr(step, "ours", lambda *_: pytest.fail("the run was started"))
    step.against_peer(64, "binary", "bfloat16")
    assert capsys.readouterr().out == "peer_64_binary_bfloat16: not run, oneDNN has no bfloat16 on this processor\n"
    shown = {name: text for name, text, _ in table.rows(table.read(tmp_path / "results"))}
    work = "step at 64 new tokens, binary, both in bfloat16, against TRL 1.8.0"
    assert shown[work] == "not run: oneDNN has no bfloat16 on this processor"


def test_approximations_are_compared_round_by_round(script: Any) -> None:
    approx = script("approx")
    rows, binary = [{"step": 3.0}, {"step": 8.0}, {"step": 5.0}], [{"step": 2.0}, {"step": 4.0}, {"step": 5.0}]
    spread = approx.ratio(rows, binary, "step")
    assert (spread.low, spread.median, spread.high) == (1.0, 1.5, 2.0)


def test_three_of_eight_prompts_have_an_advantage(script: Any, train_config: Any) -> None:
    prompts, rows = [make.prompt(i) for i in range(8)], [[make.completion()] * 8 for _ in range(8)]
    groups = script("approx").scored(prompts, rows, train_config())
    assert [g.prompt for g in groups] == prompts
    assert [any(g.advantages) for g in groups] == [True] * 3 + [False] * 5
    assert [s.value for s in groups[0].scores] == [0.0, 1.0] * 4


def test_approximations_run_on_a_tiny_model(script: Any, tiny_benchmark: None) -> None:
    found = script("approx").seconds(rounds=1)
    assert {name: len(rows) for name, rows in found.items()} == {"binary": 1, "topk": 1, "full": 1}
    for (row,) in found.values():
        assert row["step"] == pytest.approx(row["rollout"] + row["update"])


def test_sampling_runs_on_a_tiny_model(script: Any, tiny_benchmark: None, tmp_path: Path) -> None:
    script("rollout").main(max_new_tokens=3, rounds=1)
    found = json.loads((tmp_path / "results/rollout_3.json").read_text())
    assert found["ratio"]["median"] > 0
    assert all(1 <= tokens <= 3 for tokens in found["response_tokens"].values())


def test_the_beginning_is_what_all_prompts_share(script: Any, tiny_benchmark: None) -> None:
    """In characters: the tiny tokenizer's tokens. The numbers begin after it."""
    assert script("floor").beginning() == len("<user>What is ")


def test_rewards(script: Any) -> None:
    reward = script("reward")
    assert reward.contains_answer(["", ""], ["it is 74.", "7"], answer=["74", "74"]) == [1.0, 0.0]
    assert reward.every_other(["", "", ""], ["", "", ""]) == [0.0, 1.0, 0.0]


def test_the_floor_counts_operations_and_bytes(script: Any) -> None:
    """By hand: one layer, hidden 4, two heads of 2, one key-value head, inner 8, vocabulary 10; 64 sequences."""
    config = SimpleNamespace(
        hidden_size=4, intermediate_size=8, num_hidden_layers=1, vocab_size=10, num_key_value_heads=1, head_dim=2
    )
    config.num_attention_heads = 2
    step = {
        "response_tokens": 3,
        "response_tokens_max": 5,
        "prompt_tokens": 2,
        "skipped": 0.5,
        "time": {"rollout": 1.0, "update": 2.0},
    }
    found = script("floor").floors(config, [step], beginning=1, peak_flops=1000.0, peak_bytes=1000.0)
    body, head, tokens = 2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8, 40, 64 * 3
    operations = 2 * body * (tokens + 1 + 1 * 8) + 2 * head * tokens
    moved = 4 * (5 * (body + head) + tokens * (2 + 1.5) * 2 * 2)
    assert found["rollout"]["operations_seconds"] == pytest.approx(operations / 1000)
    assert found["rollout"]["bytes_seconds"] == pytest.approx(moved / 1000)
    update = 4 * body * (tokens / 2 + 1 + 1 * 4) + 4 * head * tokens / 2
    assert found["update"]["operations_seconds"] == pytest.approx(update / 1000)
    assert found["update"]["times_floor"].median == pytest.approx(2.0 / (update / 1000))


def test_the_table_shows_what_was_saved_and_what_was_not(script: Any, tmp_path: Path) -> None:
    table = script("table")
    spread = {"low": 1.0, "median": 2.0, "high": 3.0}
    head = {"memory_ratio": spread, "time_ratio": {"low": 0.5, "median": 0.625, "high": 0.75}}
    (tmp_path / "head.json").write_text(json.dumps(head))
    rows = {work: text for work, text, _ in table.rows(table.read(tmp_path))}
    assert rows["head, 4,096 tokens x 2,048 x 128,256, against materialised logits"] == (
        "1/2 (1 to 3) of the extra memory, 0.625 (0.5 to 0.75) times the time"
    )
    assert rows["help"] == "not measured"


def test_the_tables_of_floor_and_growth(script: Any) -> None:
    table = script("table")
    spread = {"low": 1.0, "median": 2.0, "high": 3.0}
    phase = {"seconds": spread, "operations_seconds": 0.5, "bytes_seconds": 0.25, "times_floor": spread}
    floor = {"gflops": 140.0, "gb_per_second": 29.0, "64": {"rollout": phase}, "256": {"update": phase}}
    text = table.floor_table(floor)
    assert "140 GFLOP/s" in text[2] and "29 GB/s" in text[2]
    assert text[-1] == "| 256 | update | 2 (1 to 3) | 0.5 s | 0.25 s | 2 (1 to 3) |"
    point = {
        "vocabulary": 32_000,
        "seconds": spread,
        "rollout": spread,
        "update": spread,
        "gib": 1.5,
        "ms_per_token": 0.25,
    }
    fit = {"r2_time": 0.999, "r2_memory": 0.98, "time_exponent": 1.0, "memory_exponent": 0.5}
    lines = table.growth_table({"vocabulary": {"points": [point], **fit}})
    assert "| 32,000 | 2 (1 to 3) | 2 (1 to 3) | 2 (1 to 3) | 0.25 | 1.50 |" in lines
    assert any("0.999 for the time" in line and "2^0.50" in line for line in lines)
