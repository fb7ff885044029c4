"""The GPU benchmark on a CPU, with tiny shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dppo_cli.rollout.copies import base_weight


def test_the_shapes_of_the_gpu_benchmark_are_those_of_8b(script: Any) -> None:
    size = script("gpu_model").LLAMA_8B
    assert (size.layer_parameters, size.head_parameters) == (6_979_321_856, 525_336_576)
    assert size.cache_bytes == 131_072


@pytest.mark.filterwarnings("ignore")
def test_every_step_of_the_gpu_benchmark_runs_on_a_cpu(script: Any, tmp_path: Path) -> None:
    gpu = script("gpu")
    gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())
    rows = {row["what"]: row for row in found["rows"]}
    assert [row for row in found["rows"] if "failed" in row] == []

    def of_card(name: str, slots: int) -> list[str]:
        whats = f"1 tokens of each of {slots} sequences of", "update of 2 sequences of"
        return [f"{name}, {what} 8 + {new}" for new in (8, 32) for what in whats]

    # Those of the other files gpu_*.py have tests of their own.
    decoding = ("static step", "long-tailed", "long prompts", "looking every")
    assert len([name for name in rows if name.startswith(decoding)]) == 14
    assert [name for name in rows if not name.startswith((*decoding, "kernel", "product"))] == [
        "probe",
        "decode, bf16 + LoRA, 2 rows",
        "decode, bf16 + LoRA, 4 rows",
        "decode, bf16 + LoRA, 4 rows, top-20",
        "transformers' generate, 4 rows",
        "update, bf16 LoRA, 2 x 2 x (8 + 8)",
        "update, bf16 LoRA, prompts first, 2 x 2 x (8 + 8)",
        "update, bf16 LoRA, plain modules, 2 x 2 x (8 + 8)",
        "whole step, bf16 LoRA",
        *of_card("gpu_80gb", 160),
        "decode, NF4 + LoRA, 2 rows",
        "decode, NF4 + LoRA, 4 rows",
        "decode, NF4 + LoRA, 4 rows, top-20",
        "update, QLoRA, recomputing, 2 x 2 x (8 + 8)",
        "update, QLoRA, recomputing, not packed, 2 x 2 x (8 + 8)",
        "update, QLoRA, nothing recomputed, 2 x 2 x (8 + 8)",
        *of_card("gpu_16gb", 16),
        *of_card("gpu_24gb", 32),
        *(
            f"{family}, bf16 + LoRA, {of}"
            for family in ("Gemma 3 1B", "Phi-4-mini")
            for of in ("4 rows", "update, 2 x 2 x (8 + 8)", "update, prompts first, 2 x 2 x (8 + 8)")
        ),
        "whole step, TRL",
    ]
    assert rows["whole step, TRL"]["not_run"] == "No module named 'trl'"
    update = rows["update, bf16 LoRA, 2 x 2 x (8 + 8)"]
    assert update["tokens_per_s"] == pytest.approx(2 * 2 * 8 / update["seconds"])
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("no GPU (") and "| whole step, TRL | not_run No module named 'trl' |" in text


def test_other_families_have_the_shapes_of_their_models(script: Any) -> None:
    """1.00 and 3.84 billion parameters, as their YAML files say, with the embedding once."""
    sizes = script("gpu_families").SIZES
    billions = [(of.layer_parameters + of.head_parameters) / 1e9 for of, _ in sizes.values()]
    assert billions == pytest.approx([1.0, 3.84], abs=0.01)
    gemma, phi = (of.config(**of.model) for of, _ in sizes.values())
    assert gemma.layer_types.count("full_attention") == 4 and gemma.head_dim == 256
    assert phi.rope_parameters["partial_rotary_factor"] == 0.75


@pytest.mark.filterwarnings("ignore")
def test_the_gpu_benchmark_quantises_all_layers_but_the_head(script: Any) -> None:
    model = script("gpu_model")
    made = model.policy(model.TINY, torch.device("cpu"), model.config(model.TINY, "adapter=qlora"))
    plain = model.plain_model(model.TINY, torch.device("cpu"), torch.float32)
    layers = {name: m.base_layer for name, m in made.model.named_modules() if hasattr(m, "base_layer")}
    assert len(layers) == 2 * 7 and {layer.weight.dtype for layer in layers.values()} == {torch.uint8}
    assert made.model.lm_head.weight.dtype == torch.float32
    for name, layer in layers.items():
        weight = plain.get_submodule(name).weight
        assert 0.05 < (base_weight(layer) - weight).norm() / weight.norm() < 0.12


@pytest.mark.filterwarnings("ignore")
def test_a_step_of_the_gpu_benchmark_that_takes_too_long_or_fails_leaves_the_others(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = script("gpu")

    def broken(_: Any) -> None:
        raise ValueError("broken\nand more")

    steps = {
        "slow": (0.2, lambda _: gpu.time.sleep(20)),
        "broken": (5.0, broken),
        "last": (5.0, lambda bench: bench.add("last", seconds=1.0)),
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert found == [
        {"what": "slow", "failed": "TimeoutError: stopped after its 0.2 s"},
        {"what": "broken", "failed": "ValueError: broken"},
        {"what": "last", "seconds": 1.0},
    ]
    gpu.main(["--device", "cpu", "--tiny", "--out", str(tmp_path), "--only", "last"])
    assert len(json.loads((tmp_path / "gpu.json").read_text())["rows"]) == 1
    with pytest.raises(SystemExit):
        gpu.main(["--only", "first"])
