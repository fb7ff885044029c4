"""The comparison with TRL on a GPU, with a stand-in for TRL."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

WHAT = "whole step, TRL"


class Trainer:
    """Two steps; `fails` says at which it does not end, for each size of a micro-batch, and how."""

    fails: dict[int, tuple[int, Exception]]
    made: list[Any]

    def __init__(self, args: Any, callbacks: Any, **given: Any) -> None:
        self.args, self.clock, self.given = args, callbacks[0], given
        self.made.append(args)

    def train(self) -> None:
        self.clock.on_train_begin()
        at, error = self.fails.get(self.args.per_device_train_batch_size, (3, None))
        for step in (1, 2):
            if step == at:
                raise error
            self.clock.on_step_end()
            self.clock.on_log(logs={"completions/mean_length": 8.0})


@pytest.fixture
def measured(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    names = ("trl", "trl.experimental", "trl.experimental.dppo")
    modules = [ModuleType(name) for name in names]
    modules[1].dppo = modules[2]
    modules[2].DPPOConfig, modules[2].DPPOTrainer = SimpleNamespace, Trainer
    for name, module in zip(names, modules, strict=True):
        monkeypatch.setitem(sys.modules, name, module)
    steps, model, peers = script("gpu_steps"), script("gpu_model"), script("gpu_peers")

    def measure(**fails: tuple[int, Exception]) -> dict[str, Any]:
        Trainer.fails, Trainer.made = {int(name[1:]): of for name, of in fails.items()}, []
        bench = steps.Bench(model.TINY, torch.device("cpu"), out=tmp_path)
        peers.peer(bench)
        (row,) = bench.rows
        return row

    return measure


def test_both_steps(measured: Any, capsys: pytest.CaptureFixture[str]) -> None:
    row = measured()
    assert row["what"] == WHAT and row["micro_batch"] == 2 and row["response_tokens"] == 8.0
    assert 0 <= row["first_s"] < 5 and 0 <= row["seconds"] < 5 and "not_ended" not in row
    (args,) = Trainer.made
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 2 * 2
    assert args.generation_kwargs == {"min_new_tokens": args.max_completion_length} == {"min_new_tokens": 8}
    told = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in told if line.startswith("step")] == ["step 1", "step 2"]


def test_a_second_step_that_does_not_end(measured: Any) -> None:
    row = measured(_2=(2, TimeoutError("stopped after its 200 s")))
    assert row["not_ended"] == "TimeoutError: stopped after its 200 s" and row["micro_batch"] == 2
    assert "first_s" in row and "seconds" not in row and len(Trainer.made) == 1


def test_memory_that_runs_out(measured: Any) -> None:
    full = torch.OutOfMemoryError("CUDA out of memory.\nmore")
    row = measured(_2=(1, full))
    assert row["micro_batch"] == 1 and row["out_of_memory_with"] == 2 and "seconds" in row
    assert [args.gradient_accumulation_steps for args in Trainer.made] == [2, 4]
    row = measured(_2=(1, full), _1=(1, full))
    assert row["micro_batch"] == 1 and row["not_ended"] == "OutOfMemoryError: CUDA out of memory."
    assert "first_s" not in row and len(Trainer.made) == 2


def test_prompts_have_as_many_tokens_in_words(script: Any) -> None:
    """Words that begin like a special token would be two."""
    model, steps = script("gpu_model"), script("gpu_steps")
    tokenizer = model.tokenizer(model.TINY.model["vocab_size"])
    prompts = steps.prompts_of(model.TINY, 4, 64)
    assert {str(i)[0] for prompt in prompts for i in prompt.token_ids} >= {"1", "2"}
    assert len(tokenizer) == 96 and (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    for prompt in prompts:
        assert tuple(tokenizer(" ".join(f"w{i}" for i in prompt.token_ids))["input_ids"]) == prompt.token_ids
