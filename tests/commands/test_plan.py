"""`dppo plan`: what it says, what fits, and what it refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from plans import built, machine, report

from dppo_cli.cli.main import main
from dppo_cli.commands.planning.machine import GIB, GPU_RUNTIME
from dppo_cli.commands.planning.shapes import NF4_BYTES

# What it says


def test_json_is_one_object_with_the_run_in_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "json=true", "steps=5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True and found["change"] is None
    assert found["batch"] == {
        "prompts": 64,
        "samples_per_prompt": 8,
        "samples": 512,
        "updates": 2,
        "samples_per_update": 256,
        "micro_batches_per_update": 2,
        "sampled_at_once": 512,
        "tokens_per_step": 4096,
        "tokens": 20480,
        "steps": 5,
        "processes": 1,
        "turns": 1,
    }
    assert found["model"]["parameters"] == 935_296
    assert found["prompts"]["source"].startswith("the data's")
    # Of this process, which may have run many tests before.
    assert 0.05 < found["peak_memory_gib"] - found["parts"]["libraries"] < 0.5
    for phase in found["phases"].values():
        assert sum(phase.values()) <= found["peak_memory_gib"] + 1e-9
    assert sum(found["phases"][found["peak_phase"]].values()) == pytest.approx(found["peak_memory_gib"])
    assert found["parts"]["AdamW moments"] == pytest.approx(8 * found["model"]["trained_parameters"] / GIB)
    assert found["activations_gib"]["gradient_checkpointing"] < found["activations_gib"]["plain"]
    assert found["seconds_per_step"] == pytest.approx(found["seconds"]["sampling"] + found["seconds"]["update"])
    assert 0.01 < found["seconds_per_step"] < 120 and found["speed"]["source"] == "measured here"


def test_later_turns_need_memory_and_their_time_is_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """In a later turn no two samples share a prompt, and each has what it has said before it."""
    words = (
        "sampling.max_new_tokens=40",
        "batch.prompts_per_step=4",
        "batch.samples_per_prompt=64",
        "batch.prompts_per_update=4",
    )
    for device, part in (("cpu", "prompts before sampling"), ("cuda", "KV cache of sampling")):
        one, several = (
            report(machine(80, device), *words, "data.eval_problems=4", f"environment={choice}")
            for choice in ("none", "calculator")
        )
        assert (one["batch"]["turns"], several["batch"]["turns"]) == (1, 9)
        assert several["parts"][part] > 1.5 * one["parts"][part] and several["seconds"] == one["seconds"]
    assert main(["plan", *words, "environment=calculator"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "rewards, evaluations and later turns not counted" in shown


def test_the_tables_say_it_in_words(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["plan", "sampling.max_new_tokens=16"]) == 0
    out = capsys.readouterr().out
    assert "64 prompts x 8 samples = 512 samples, 512 at once; 2 updates of 256 samples" in out
    assert "8,192 a step at most, 491,520 in 60 steps" in out
    assert "it fits" in out and "libraries" in out and "KV cache of sampling" in out


@pytest.mark.parametrize(("word", "value"), [("json=true", True), ("card=l4", "l4"), ("prompt_tokens=64", 64)])
def test_its_own_keys_have_an_effect(word: str, value: object) -> None:
    key = word.partition("=")[0]
    assert getattr(built(word), key) == value and getattr(built(), key) != value


# What fits


@pytest.mark.parametrize(
    ("words", "change"),
    [
        (("hardware.tokens_per_micro_batch=4096", "sampling.max_new_tokens=64"), "hardware.tokens_per_micro_batch="),
        (("hardware.tokens_per_micro_batch=64", "sampling.max_new_tokens=64"), "rollout.concurrent_sequences="),
    ],
    ids=["update", "sampling"],
)
def test_the_change_is_about_the_phase_of_the_peak(words: tuple[str, ...], change: str) -> None:
    needed = report(machine(100), *words)["needed_gib"]
    found = report(machine(needed - 0.01), *words)
    assert found["fits"] is False and found["change"]["words"].startswith(change)
    again = report(machine(needed - 0.01), *words, found["change"]["words"])
    assert again["fits"] is True and again["needed_gib"] < needed - 0.01
    assert again["peak_memory_gib"] == pytest.approx(found["change"]["peak_memory_gib"], rel=1e-6)


def test_nothing_makes_it_fit_where_the_libraries_do_not() -> None:
    found = report(machine(0.4))
    assert found["fits"] is False and found["change"] is None


STAY = "slots and graphs of sampling, which stay"


def test_slots_stay_on_a_gpu_if_they_are_small_and_of_the_policy_itself() -> None:
    """Not those of a copy, whose weights are elsewhere each time."""
    words = ("prompt_tokens=8", "sampling.max_new_tokens=32", "batch.prompts_per_step=4", "batch.prompts_per_update=4")
    phases = report(machine(24, "cuda"), *words)["phases"]
    sampling = phases["sampling"]
    bound = sampling["KV cache of sampling"] + sampling["logits of sampling"] + sampling["samples"]
    updates = [name for name in phases if name.startswith("update")]
    assert len(updates) == 3 and all(phases[name][STAY] == pytest.approx(bound) for name in updates)
    assert all(STAY not in phases[name] for name in ("loading", "sampling", "sampling, prompts"))
    others = (
        (machine(24, "cuda"), ("rollout.weights=merged",)),
        (machine(9 * sampling["KV cache of sampling"], "cuda"), ()),
    )
    for of, more in others:
        assert all(STAY not in phase for phase in report(of, *words, *more)["phases"].values())


def test_a_gpu_needs_more_than_a_run_reports() -> None:
    found = report(machine(24, "cuda"))
    assert found["needed_gib"] >= found["peak_memory_gib"] + GPU_RUNTIME / GIB
    assert found["peak_memory_gib"] < report(machine(24))["peak_memory_gib"]


def test_moments_in_8_bits_take_a_quarter() -> None:
    trained = report(machine(24))["model"]["trained_parameters"]
    found = report(machine(24), "optim.bits=8")["parts"]["AdamW moments"]
    # Matrices of fewer than 4,096 numbers stay in 32 bits.
    assert 2 * trained / GIB < found < 0.8 * 8 * trained / GIB


def test_a_copy_in_4_bits_of_weights_that_are_not() -> None:
    """As `rollout.weights=quantized` samples from, where the base trains in 16 or 32 bits: 901,120 of the weights."""
    words, name = ("sampling.max_new_tokens=32", "prompt_tokens=32"), "sampler's copy of weights"
    copies = {
        kind: report(machine(24, "cuda"), *words, f"rollout.weights={kind}")["parts"].get(name, 0.0)
        for kind in ("merged", "quantized", "adapter")
    }
    assert copies["merged"] == pytest.approx(901_120 * 2 / GIB) and copies["adapter"] == 0
    assert copies["quantized"] == pytest.approx(901_120 * NF4_BYTES / GIB)


def test_products_in_4_bits_decode_on_a_gpu_that_has_the_kernel() -> None:
    """Up to 256 rows. Its scales in float32 stay."""
    words = ("adapter=qlora", "rollout.weights=quantized", "sampling.max_new_tokens=32", "prompt_tokens=32")
    with_kernel, without = replace(machine(24, "cuda"), decoded_for=128), machine(24, "cuda")
    scales = "scales of 4-bit products"
    few, most = (f"rollout.concurrent_sequences={n}" for n in (256, 257))
    fused, dequantised = (report(of, *words, few) for of in (with_kernel, without))
    assert fused["parts"][scales] == pytest.approx(901_120 * 4 / 64 / GIB) and scales not in dequantised["parts"]
    assert fused["seconds"]["sampling"] != dequantised["seconds"]["sampling"]
    assert fused["seconds"]["update"] == dequantised["seconds"]["update"]
    of_more = [report(of, *words, most)["seconds"]["sampling"] for of in (with_kernel, without)]
    assert of_more[0] == of_more[1]


# Prompts


def test_prompts_of_a_given_length() -> None:
    found = report(machine(24), "prompt_tokens=50")
    assert found["prompts"] == {"mean": 50.0, "longest": 50, "source": "prompt_tokens=50"}
    assert found["parts"]["KV cache of sampling"] > report(machine(24))["parts"]["KV cache of sampling"]


def test_prompts_are_assumed_where_the_data_is_not_there(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    words = ("model=hf", f"model.path={folder}", "data=file", f"data.path={tmp_path}/none.jsonl")
    found = report(machine(24), *words, "sampling.max_new_tokens=8")["prompts"]
    assert found["source"].startswith("248 tokens assumed: ") and "none.jsonl" in found["source"]
    assert report(machine(24), *words, "sampling.max_new_tokens=8", "prompt_tokens=9")["prompts"]["mean"] == 9


def test_prompts_of_evaluations_are_counted_whatever_the_groups() -> None:
    """As many run at once as there are slots: with groups of 16 no fewer for 32 slots than for 36."""
    words = ("prompt_tokens=64", "batch.samples_per_prompt=16", "sampling.max_new_tokens=32", "data.eval_problems=100")
    found = [report(machine(24, "cuda"), *words, f"rollout.concurrent_sequences={n}") for n in (32, 36, 40)]
    assert [plan["batch"]["sampled_at_once"] for plan in found] == [32, 36, 40]
    sizes = [plan["parts"]["prompts before sampling"] for plan in found]
    assert sizes == pytest.approx([sizes[0], sizes[0] * 36 / 32, sizes[0] * 40 / 32], rel=0.02)
    fewer = report(machine(24, "cuda"), *words, "rollout.concurrent_sequences=32", "data.eval_problems=8")
    assert fewer["parts"]["prompts before sampling"] == pytest.approx(sizes[0] / 4, rel=0.05)


def test_more_sequences_at_once_are_named_if_they_fit_and_pay() -> None:
    words = ("batch.prompts_per_step=64", "batch.prompts_per_update=16", "prompt_tokens=20", "data.eval_problems=16")
    few = (*words, "rollout.concurrent_sequences=32")
    found = report(machine(24, "cuda"), *few)
    assert found["batch"]["samples"] == 512 and found["faster"]["words"] == "rollout.concurrent_sequences=512"
    then = report(machine(24, "cuda"), *words, found["faster"]["words"])
    assert found["faster"] == {
        "words": "rollout.concurrent_sequences=512",
        "seconds_per_step": then["seconds_per_step"],
        "peak_memory_gib": then["peak_memory_gib"],
    }
    assert then["seconds_per_step"] < 0.95 * found["seconds_per_step"] and then["faster"] is None
    # A tenth of the card is left: where 512 would just fit 256 are named, and where 64 would, none.
    for free, would_fit, named in ((1.0, 512, "rollout.concurrent_sequences=256"), (0.72, 64, None)):
        card = machine(free, "cuda")
        faster = report(card, *few)["faster"]
        assert (faster and faster["words"]) == named
        assert report(card, *words, f"rollout.concurrent_sequences={would_fit}")["fits"]
    # All at once would be less than 5% faster than half of them.
    assert report(machine(24, "cuda"), *words, "rollout.concurrent_sequences=256")["faster"] is None


def test_what_is_faster_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["card=l4", "prompt_tokens=20", "batch.prompts_per_step=64", "batch.prompts_per_update=16"]
    assert main(["plan", *words, "rollout.concurrent_sequences=32"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert re.search(
        r"faster rollout\.concurrent_sequences=512: [\d.]+ m?s a step at most, [\d.]+ GiB at the peak", shown
    )
    assert main(["plan", *words]) == 0
    assert "faster" not in capsys.readouterr().out


# What it refuses


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["model.path=embedded:none"], "there is no embedded model 'none'"),
        (["model=hf", "model.path=./none"], "there is no model folder ./none"),
        (["hardware.device=cuda"], "name the card to plan for, card=l4 for example"),
        (["hardware.device=mps"], "hardware.device=mps cannot be planned"),
        (["card=l5"], "did you mean 'l4'?"),
        (["card=h100", "hardware=cpu"], "card=h100 is a GPU, but hardware.device=cpu"),
        (["resume=runs/last"], "plan is for new runs"),
        (["prompt_tokens=0"], "prompt_tokens=0 breaks the rule"),
        (["prompt_tokens=1000000"], "lower one of the two"),
        (["cart=l4"], "there is no key cart; did you mean card?"),
        (["hardware=gpu_48gb"], "there is no hardware=gpu_48gb"),
        (["steps=0"], "steps=0 must be at least 1"),
        (["rollout.weights=dequantized"], "needs a quantised base"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_mistake_is_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert line in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_a_hub_that_cannot_be_reached_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dppo_cli.commands.planning.shapes.hub_answers", lambda: False)
    assert main(["plan", "model=llama3_2_1b"]) == 2
    err = capsys.readouterr().err
    assert "found no config.json of meta-llama/Llama-3.2-1B-Instruct, neither in the local cache nor on the hub" in err
    assert err.count("\n") == 1


def test_a_sweep_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "-m", "seed=1,2"]) == 2
    assert "plan takes one run at a time; leave -m out" in capsys.readouterr().err
