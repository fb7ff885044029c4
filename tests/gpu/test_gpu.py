"""Training and sampling on a GPU, end to end: `make test-gpu`."""

from pathlib import Path

import fused_cases
import gpu_cases
import pytest
import tiny_models
import torch

from dppo_cli.config.conf_tree import groups
from dppo_cli.kernels.segment_kernels import FlashOnCUDA, Kernel, Plain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
    pytest.mark.usefixtures("work"),
]
FAMILIES = ("llama", "qwen3", "gemma3", "mistral")
MORE_FAMILIES = ("phi3", "smollm3", "olmo2", "gemma3", "mistral_window")
"""Whose layers differ from those of Llama, or have windows."""
EMBEDDED = Path("embedded:arithmetic_1m")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {family: tiny_models.save(root / family, family) for family in {*FAMILIES, *MORE_FAMILIES}}


@pytest.mark.parametrize("adapter", groups()["adapter"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_on_every_family(family: str, adapter: str, families: dict[str, Path], work: Path) -> None:
    gpu_cases.runs("cuda", families[family], work / "run", f"adapter={adapter}")


@pytest.mark.parametrize("weights", ["dequantized", "quantized"])
def test_a_4_bit_base_is_sampled_from_in_both_ways(weights: str, families: dict[str, Path], work: Path) -> None:
    gpu_cases.runs("cuda", families["llama"], work / "run", "adapter=qlora", f"rollout.weights={weights}")


@pytest.mark.parametrize("approx", ["binary", "topk", "full"])
@pytest.mark.parametrize("divergence", ["tv", "kl"])
@pytest.mark.parametrize("model", ["llama", "embedded"])
def test_every_approximation(model: str, divergence: str, approx: str, families: dict[str, Path], work: Path) -> None:
    k = ["approx.k=5"] if approx == "topk" else []
    folder = EMBEDDED if model == "embedded" else families[model]
    gpu_cases.runs("cuda", folder, work / "run", f"divergence={divergence}", f"approx={approx}", *k)


@pytest.mark.parametrize("objective", groups()["objective"])
def test_every_objective(objective: str, families: dict[str, Path], work: Path) -> None:
    gpu_cases.runs("cuda", families["qwen3"], work / "run", f"objective={objective}")


@pytest.mark.parametrize(
    "words",
    [
        ("optim=adamw_8bit", "adapter.r=128"),
        ("hardware.gradient_checkpointing=true",),
        ("hardware.dtype=float32",),
        ("anchor=recompute", "approx=topk", "approx.k=4"),
        ("kl_to_reference=0.1",),
        ("adapter.dropout=0.1",),
        ("sampling.max_new_tokens=20", "sampling.stop=[zz]"),
        ("sampling.max_new_tokens=20",),
    ],
    ids=lambda words: words[0],
)
def test_other_choices(words: tuple[str, ...], families: dict[str, Path], work: Path) -> None:
    agrees = not words[0].startswith("adapter.dropout")
    gpu_cases.runs("cuda", families["llama"], work / "run", *words, agrees=agrees)


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_the_sampler_agrees_with_the_trainer_as_the_trainer_with_itself(model: str, adapter: str, train_config) -> None:
    config = train_config(f"adapter={adapter}", "sampling.max_new_tokens=32", model=model)
    apart, own = gpu_cases.sampler_agrees_with_the_trainer(config, "cuda", "bfloat16")
    print(f"{model} {adapter}: mean |pi - mu| {apart:.2g}, the trainer's own {own:.2g}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("words", [(), ("hardware.gradient_checkpointing=true",)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_packed_updates_agree_with_whole_sequences(
    model: str, adapter: str, words: tuple[str, ...], dtype: str, train_config
) -> None:
    config = train_config(f"adapter={adapter}", *gpu_cases.UNMASKED, *words, model=model)
    apart, own = gpu_cases.packed_updates_agree_with_whole_sequences(config, "cuda", dtype)
    print(f"{model} {adapter} {dtype}: packed {apart:.2g}, whole sequences' own {own:.2g}")


@pytest.mark.parametrize("words", [(), ("hardware.gradient_checkpointing=true",)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_packed_updates_of_more_families(
    family: str, words: tuple[str, ...], families: dict[str, Path], train_config
) -> None:
    config = train_config(*gpu_cases.UNMASKED, *words, f"model.path={families[family]}")
    apart, own = gpu_cases.packed_updates_agree_with_whole_sequences(config, "cuda", "bfloat16")
    print(f"{family}: packed {apart:.2g}, whole sequences' own {own:.2g}")


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.bfloat16, FlashOnCUDA), (torch.float32, Plain)])
def test_attention_over_segments_agrees_with_plain_operations(dtype: torch.dtype, kernel: type[Kernel]) -> None:
    print(gpu_cases.attention_over_segments_agrees_with_plain_operations("cuda", dtype, kernel))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_kernels_are_as_exact_as_plain_operations(dtype: torch.dtype) -> None:
    print(fused_cases.kernels_are_as_exact_as_plain_operations("cuda", dtype, tokens=700))


@pytest.mark.parametrize("words", [(), ("hardware.gradient_checkpointing=true",)], ids=["kept", "recomputed"])
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@pytest.mark.parametrize("model", ["llama3", "qwen3"])
def test_fused_modules_agree_with_plain_ones(model: str, adapter: str, words: tuple[str, ...], train_config) -> None:
    config = train_config(f"adapter={adapter}", *words, model=model)
    print(fused_cases.modules_agree_with_plain_ones(config, "cuda", "bfloat16"))


@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_fused_modules_of_more_families(family: str, families: dict[str, Path], train_config) -> None:
    config = train_config(f"model.path={families[family]}")
    print(fused_cases.modules_agree_with_plain_ones(config, "cuda", "bfloat16"))


def test_equal_commands_give_equal_tokens(families: dict[str, Path], work: Path) -> None:
    gpu_cases.equal_commands_give_equal_tokens("cuda", families["llama"], work)


def test_the_default_run_learns(work: Path) -> None:
    gpu_cases.learns("cuda", work / "run")


def test_memory_that_runs_out_ends_in_a_line(
    families: dict[str, Path], work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_cases.memory_that_runs_out_ends_in_a_line(
        "cuda", families["llama"], work / "run", gpu_cases.a_full_gpu, monkeypatch, capsys
    )
