"""`dppo plan` for cards that need not be here, above all with Llama 3.1 8B."""

import json
from pathlib import Path
from typing import Any

import pytest
from plans import machine, plan, report, save_llama_8b

from dppo_cli.commands.planning.cards import CARDS, OF_A_SIZE, card_of
from dppo_cli.commands.planning.machine import GIB

LARGE_BATCH = ("batch.prompts_per_step=16", "batch.samples_per_prompt=8", "batch.prompts_per_update=8")
MEASURED = Path(__file__).parents[2] / "benchmarks/h100.json"


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama_8b(tmp_path_factory.mktemp("llama_8b"))


def plan_of_8b(folder: Path, *words: str) -> dict[str, Any]:
    """16 prompts of training and of evaluations, with 128 tokens, and responses of 512."""
    lengths = ("prompt_tokens=128", "data.eval_problems=16", "sampling.max_new_tokens=512")
    return plan("model=llama3_8b", f"model.path={folder}", "hardware=gpu_24gb", *lengths, *LARGE_BATCH, *words)


def test_8b_in_bfloat16_on_24_gb(llama_8b: Path) -> None:
    found = plan_of_8b(llama_8b)
    parts, trained = found["parts"], 83_886_080
    assert found["model"]["parameters"] == 8_030_261_248 and found["model"]["trained_parameters"] == trained
    assert parts["base weights (bfloat16)"] == pytest.approx(14.96, abs=0.01)
    assert parts["adapter"] == parts["gradients"] == pytest.approx(4 * trained / GIB)
    assert parts["AdamW moments"] == pytest.approx(8 * trained / GIB)
    # Each of 16 prompts once in 128 positions, rounded up to 256, and 128 responses of 512, 131,072 bytes a position;
    # autocast keeps the adapter in 16 bits meanwhile.
    assert parts["KV cache of sampling"] == pytest.approx((16 * 256 + 128 * 512) * 131072 / GIB, rel=0.01)
    assert "slots and graphs of sampling, which stay" not in parts
    assert "libraries" not in parts
    assert found["machine"] == CARDS["l4"].name and found["needed_gib"] > found["peak_memory_gib"] + 0.5
    assert found["model"]["samples_with"].startswith("weights with the adapter beside them, bfloat16")


def test_one_change_makes_it_fit_and_is_checked(llama_8b: Path) -> None:
    found = plan_of_8b(llama_8b)
    assert not found["fits"]
    again = plan_of_8b(llama_8b, found["change"]["words"])
    assert again["fits"] and again["peak_memory_gib"] == pytest.approx(found["change"]["peak_memory_gib"], rel=1e-6)
    assert again["needed_gib"] <= found["free_gib"] < found["needed_gib"]


def test_four_bits_leave_room(llama_8b: Path) -> None:
    found = plan_of_8b(llama_8b, "adapter=qlora")
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
    """A tenth of the card or more is left."""
    small = ("batch.prompts_per_step=32", "batch.samples_per_prompt=8", "batch.prompts_per_update=4")
    found = plan(
        *("model=llama3_8b", f"model.path={llama_8b}", "prompt_tokens=256", *small),
        *(f"hardware={hardware}", f"sampling.max_new_tokens={tokens}", *words),
    )
    assert found["fits"] and found["needed_gib"] < 0.9 * found["free_gib"]
    assert found["batch"]["sampled_at_once"] == {"gpu_16gb": 16, "gpu_24gb": 32, "gpu_80gb": 160}[hardware]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [8, 64, 256])
@pytest.mark.parametrize("kind", ["bf16", "NF4"])
def test_sampling_on_an_h100_takes_about_what_was_measured(llama_8b: Path, kind: str, rows: int) -> None:
    """The newest of the measurements in benchmarks/: 448 + 128 tokens, groups of 8."""
    runs = json.loads(MEASURED.read_text(encoding="utf-8"))
    name = f"static step, {kind} + LoRA, graphs, {rows} rows"
    row = [row for run in runs for row in run["rows"] if row["what"] == name][-1]
    measured = row["prefill_s"] + 128 * row["ms_per_step"] / 1000
    words = ("adapter=qlora", "rollout.weights=quantized") if kind == "NF4" else ()
    found = plan(
        *("model=llama3_8b", f"model.path={llama_8b}", "prompt_tokens=448", "sampling.max_new_tokens=128"),
        *(f"batch.prompts_per_step={rows // 8}", "batch.samples_per_prompt=8", "batch.prompts_per_update=1"),
        *("hardware=gpu_80gb", "card=h100", f"rollout.concurrent_sequences={rows}", *words),
    )
    print(f"planned {found['seconds']['sampling']:.2f} s, measured {measured:.2f} s")
    assert found["seconds"]["sampling"] == pytest.approx(measured, rel=0.2)


def test_a_faster_card_takes_less_time() -> None:
    words = ("prompt_tokens=32", *LARGE_BATCH)
    slow, fast = (plan(*words, f"card={card}")["seconds_per_step"] for card in ("l4", "h100"))
    assert fast < slow


def test_cards_of_a_size() -> None:
    assert card_of("gpu_16gb") == "rtx4080" and card_of("gpu_24gb") == "l4" and card_of("gpu_80gb") == "a100_80gb"
    assert card_of("auto") is None and card_of("cpu") is None
    for size, name in OF_A_SIZE.items():
        assert 0.85 * size < CARDS[name].memory_gib < size


@pytest.mark.slow
def test_a_smaller_model_is_tried_last(llama_8b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dppo_cli.commands.planning.shapes.hub_answers", lambda: False)
    words = ("model=llama3_8b", f"model.path={llama_8b}", "prompt_tokens=16", "data=arithmetic")
    found = report(machine(3, "cuda"), *words, "batch.prompts_per_step=2", "batch.prompts_per_update=2")
    assert found["fits"] is False and found["change"]["words"] == "model=arithmetic_1m"
