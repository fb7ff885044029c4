"""A plan for several processes is that of the one with the most to do."""

import pytest
from plans import built, machine, report

from dppo_cli.cli.main import main
from dppo_cli.commands.planning.share import share_of

BATCH = ("batch.prompts_per_step=12", "batch.prompts_per_update=6", "batch.samples_per_prompt=4")


def test_a_process_has_whole_groups_and_a_gpu_of_its_own() -> None:
    config, card = built(*BATCH, "hardware.processes=4"), machine(24, "cuda")
    own, of_it = share_of(config, card)
    assert (own.batch.prompts_per_update, own.batch.prompts_per_step) == (2, 4), "6 groups in 4 processes: 2, 2, 1, 1"
    assert own.batch.updates_per_step == config.batch.updates_per_step == 2
    assert of_it is card
    alone = built(*BATCH)
    assert share_of(alone, card) == (alone, card)


def test_processes_share_the_cpu_and_its_memory() -> None:
    _, part = share_of(built(*BATCH, "hardware.processes=2"), machine(8))
    whole, half = machine(8).speed(), part.speed()
    assert (part.total, part.free) == (machine(8).total / 2, machine(8).free / 2)
    assert (half.flops, half.float32, half.bytes_per_second) == (
        whole.flops / 2,
        whole.float32 / 2,
        whole.bytes_per_second / 2,
    )
    assert half.source == f"{whole.source}; a share of 1/2 for each process"


def test_two_gpus_take_half_the_time_for_the_tokens() -> None:
    words = (*BATCH, "sampling.max_new_tokens=16", "hardware.tokens_per_micro_batch=64")
    one, two = report(machine(24, "cuda"), *words), report(machine(24, "cuda"), *words, "hardware.processes=2")
    assert two["batch"] == {**one["batch"], "processes": 2, "sampled_at_once": 24, "micro_batches_per_update": 6}
    assert one["batch"]["sampled_at_once"] == 48 and one["batch"]["micro_batches_per_update"] == 12
    assert two["seconds"]["update"] == pytest.approx(one["seconds"]["update"] / 2, rel=1e-3)
    assert two["peak_memory_gib"] <= one["peak_memory_gib"]


def test_the_tables_say_whose_figures_they_are(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "hardware.processes=2"]) == 0
    out = capsys.readouterr().out
    assert (
        "2, each with its own share of the CPU and its memory: what runs at once, and what follows, is of each" in out
    )
    assert "64 prompts x 8 samples = 512 samples, 256 at once; 2 updates of 256 samples" in out
