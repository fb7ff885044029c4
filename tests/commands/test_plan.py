"""`dppo plan`: what it says, what fits, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from helpers import composed
from omegaconf import OmegaConf
from transformers import LlamaConfig

from dppo_cli.cli.main import main
from dppo_cli.commands.plan import make_report, prepare
from dppo_cli.commands.planning.cards import CARDS, OF_A_SIZE, card_of
from dppo_cli.commands.planning.machine import GIB, GPU_RUNTIME, Machine, Speed, find_machine
from dppo_cli.commands.schemas import PlanConfig
from dppo_cli.config.build import build

RUNTIME = 0.5 * GIB
SPEED = Speed(1e12, 1e11, 1e-5, "made up")
LARGE_BATCH = ("batch.prompts_per_step=16", "batch.samples_per_prompt=8", "batch.prompts_per_update=8")


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shapes of Llama 3.1 8B and a small tokenizer; no weights."""
    folder = tmp_path_factory.mktemp("llama_8b")
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=128256,
        max_position_embeddings=131072,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def machine(gib: float, device: str = "cpu") -> Machine:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return Machine("test", device, dtype, gib * GIB, gib * GIB, False, lambda: SPEED)


def built(*words: str) -> PlanConfig:
    """What `dppo plan <words>` builds."""
    node = OmegaConf.create(OmegaConf.to_container(composed("plan", *words)))
    return build(PlanConfig, prepare(node, words))


def report(of: Machine, *words: str) -> dict[str, Any]:
    return make_report(built(*words), of, RUNTIME)


def plan_of_8b(folder: Path, *words: str) -> dict[str, Any]:
    config = built("model=llama3_8b", f"model.path={folder}", "prompt_tokens=128", *LARGE_BATCH, *words)
    return make_report(config, find_machine(config.hardware, config.card), RUNTIME)


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


# Cards


def test_8b_in_bfloat16_on_24_gb(llama_8b: Path) -> None:
    found = plan_of_8b(llama_8b, "hardware=gpu_24gb")
    parts, trained = found["parts"], 83_886_080
    assert found["model"]["parameters"] == 8_030_261_248 and found["model"]["trained_parameters"] == trained
    assert parts["base weights (bfloat16)"] == pytest.approx(14.96, abs=0.01)
    assert parts["adapter"] == parts["gradients"] == pytest.approx(4 * trained / GIB)
    assert parts["AdamW moments"] == pytest.approx(8 * trained / GIB)
    # Each of 16 prompts once in 128 positions, rounded up to 256, and 128 responses of 256, 131,072 bytes a position;
    # autocast keeps the adapter in 16 bits meanwhile.
    assert parts["KV cache of sampling"] == pytest.approx((16 + 128) * 256 * 131072 / GIB, rel=0.01)
    assert "slots and graphs of sampling, which stay" not in parts
    assert "libraries" not in parts
    assert found["machine"] == CARDS["l4"].name and found["needed_gib"] > found["peak_memory_gib"] + 0.5
    assert found["model"]["samples_with"].startswith("weights with the adapter beside them, bfloat16")


def test_one_change_makes_it_fit_and_is_checked(llama_8b: Path) -> None:
    found = plan_of_8b(llama_8b, "hardware=gpu_24gb", "sampling.max_new_tokens=512")
    assert not found["fits"]
    again = plan_of_8b(llama_8b, "hardware=gpu_24gb", "sampling.max_new_tokens=512", found["change"]["words"])
    assert again["fits"] and again["peak_memory_gib"] == pytest.approx(found["change"]["peak_memory_gib"], rel=1e-6)
    assert again["needed_gib"] <= found["free_gib"] < found["needed_gib"]


STAY = "slots and graphs of sampling, which stay"


def test_slots_stay_on_a_gpu_if_they_are_small_and_of_the_policy_itself() -> None:
    """Not those of a copy, whose weights are elsewhere each time, nor those of stop strings, which have none."""
    words = ("prompt_tokens=8", "sampling.max_new_tokens=32", "batch.prompts_per_step=4", "batch.prompts_per_update=4")
    phases = report(machine(24, "cuda"), *words)["phases"]
    sampling = phases["sampling"]
    bound = sampling["KV cache of sampling"] + sampling["logits of sampling"] + sampling["samples"]
    updates = [name for name in phases if name.startswith("update")]
    assert len(updates) == 3 and all(phases[name][STAY] == pytest.approx(bound) for name in updates)
    assert all(STAY not in phases[name] for name in ("loading", "sampling", "sampling, prompts"))
    others = (
        (machine(24, "cuda"), ("rollout.weights=merged",)),
        (machine(24, "cuda"), ("sampling.stop=[x]",)),
        (machine(9 * sampling["KV cache of sampling"], "cuda"), ()),
    )
    for of, more in others:
        assert all(STAY not in phase for phase in report(of, *words, *more)["phases"].values())


def test_four_bits_leave_room(llama_8b: Path) -> None:
    found = plan_of_8b(llama_8b, "hardware=gpu_24gb", "adapter=qlora")
    # 6.98 billion parameters in 4 bits with their scales, 1.05 billion in 16 bits.
    assert found["parts"]["base weights (NF4, rest bfloat16)"] == pytest.approx(5.31, abs=0.02)
    assert found["parts"]["dequantisation buffers"] == pytest.approx(4096 * 14336 * 2 / GIB)
    assert found["fits"]


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        ("gpu_16gb", ("rollout=local_16gb", "adapter=qlora")),
        ("gpu_24gb", ("rollout=local_24gb", "adapter=qlora")),
        pytest.param("gpu_80gb", ("rollout=local_80gb", "adapter=lora"), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("tokens", [512, pytest.param(2048, marks=pytest.mark.slow)])
def test_8b_fits_with_the_hardware_it_was_planned_for(
    llama_8b: Path, hardware: str, words: tuple[str, ...], tokens: int
) -> None:
    """A tenth of the card or more is left: no number here was measured on one."""
    small = ("batch.prompts_per_step=32", "batch.samples_per_prompt=8", "batch.prompts_per_update=4")
    config = built(
        *("model=llama3_8b", f"model.path={llama_8b}", "prompt_tokens=256", *small),
        *(f"hardware={hardware}", f"sampling.max_new_tokens={tokens}", *words),
    )
    found = make_report(config, find_machine(config.hardware, config.card), RUNTIME)
    assert found["fits"] and found["needed_gib"] < 0.9 * found["free_gib"]
    assert found["batch"]["sampled_at_once"] == config.rollout.concurrent_sequences


def test_a_faster_card_takes_less_time() -> None:
    config = built("prompt_tokens=32", *LARGE_BATCH)
    slow, fast = (
        make_report(config, find_machine(config.hardware, card), RUNTIME)["seconds_per_step"] for card in ("l4", "h100")
    )
    assert fast < slow


def test_cards_of_a_size() -> None:
    assert card_of("gpu_16gb") == "rtx4080" and card_of("gpu_24gb") == "l4" and card_of("gpu_80gb") == "a100_80gb"
    assert card_of("auto") is None and card_of("cpu") is None
    for size, name in OF_A_SIZE.items():
        assert 0.85 * size < CARDS[name].memory_gib < size


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


@pytest.mark.slow
def test_a_smaller_model_is_tried_last(llama_8b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo_cli.commands.planning.shapes.hub_answers", lambda: False)
    config = built("model=llama3_8b", f"model.path={llama_8b}", "prompt_tokens=16", "data=arithmetic")
    config = replace(config, batch=replace(config.batch, prompts_per_step=2, prompts_per_update=2))
    found = make_report(config, machine(3, "cuda"), RUNTIME)
    assert found["fits"] is False and found["change"]["words"] == "model=arithmetic_1m"


def test_a_gpu_needs_more_than_a_run_reports() -> None:
    found = report(machine(24, "cuda"))
    assert found["needed_gib"] >= found["peak_memory_gib"] + GPU_RUNTIME / GIB
    assert found["peak_memory_gib"] < report(machine(24))["peak_memory_gib"]


def test_moments_in_8_bits_take_a_quarter() -> None:
    trained = report(machine(24))["model"]["trained_parameters"]
    found = report(machine(24), "optim.bits=8")["parts"]["AdamW moments"]
    # Matrices of fewer than 4,096 numbers stay in 32 bits.
    assert 2 * trained / GIB < found < 0.8 * 8 * trained / GIB


# Prompts


def test_prompts_of_a_given_length() -> None:
    found = report(machine(24), "prompt_tokens=50")
    assert found["prompts"] == {"mean": 50.0, "longest": 50, "source": "prompt_tokens=50"}
    assert found["parts"]["KV cache of sampling"] > report(machine(24))["parts"]["KV cache of sampling"]


def test_prompts_are_assumed_where_the_data_is_not_there(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "m")
    words = ("model=hf", f"model.path={folder}", "data=file", f"data.path={tmp_path}/none.jsonl")
    config = built(*words, "sampling.max_new_tokens=8")
    found = make_report(config, machine(24), RUNTIME)["prompts"]
    assert found["source"].startswith("248 tokens assumed: ") and "none.jsonl" in found["source"]
    config = built(*words, "sampling.max_new_tokens=8", "prompt_tokens=9")
    assert make_report(config, machine(24), RUNTIME)["prompts"]["mean"] == 9


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
