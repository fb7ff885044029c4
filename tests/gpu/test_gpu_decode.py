"""Static decoding steps on a GPU: CUDA graphs, and the attention over slots. `make test-gpu`."""

from pathlib import Path

import decode_cases
import make
import pytest
import tiny_models
import torch

from dppo_cli.kernels.flash import CLOSE, LONGEST, ROWS, FlashOverSlots, difference
from dppo_cli.kernels.slots import Room
from dppo_cli.policy.policy import model_head
from dppo_cli.rollout.copies import Sampler
from dppo_cli.rollout.static import StaticSequences, prefill

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")]
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "olmo2", "gemma3", "mistral_window")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    blocks = tiny_models.save(root / "blocks", "llama", **tiny_models.BLOCKS)
    return {"blocks": blocks, **{family: tiny_models.save(root / family, family) for family in FAMILIES}}


@pytest.fixture
def config_of(train_config, families: dict[str, Path]):
    def of(family: str, *words: str):
        return train_config(*words, f"model.path={families[family]}")

    return of


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_give_what_calls_give(config_of, family: str, dtype: str) -> None:
    decode_cases.graphs_and_calls(decode_cases.policy(config_of(family), "cuda", dtype), 4)


@pytest.mark.parametrize("weights", ["dequantized", "quantized"])
def test_graphs_of_a_4_bit_base(config_of, weights: str) -> None:
    decode_cases.graphs_and_calls(
        decode_cases.policy(config_of("blocks", "adapter=qlora"), "cuda", "bfloat16"), 4, weights
    )


@pytest.mark.parametrize("adapter", ["lora", "qlora", "dora"])
def test_the_adapter_is_read_anew(config_of, adapter: str) -> None:
    config = config_of("blocks" if adapter == "qlora" else "qwen3", f"adapter={adapter}")
    decode_cases.the_adapter_is_read_anew(decode_cases.policy(config, "cuda", "bfloat16"))


@pytest.mark.parametrize("adapter", ["lora", "qlora"])
def test_evaluations_between_steps(config_of, adapter: str) -> None:
    decode_cases.evaluations_between_steps(
        decode_cases.policy(config_of("blocks", f"adapter={adapter}"), "cuda", "bfloat16")
    )


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-3), ("bfloat16", 0.3)])
@pytest.mark.parametrize("family", FAMILIES)
def test_slots_give_what_sub_batches_give(config_of, family: str, dtype: str, most: float) -> None:
    apart = decode_cases.slots_and_sub_batches(decode_cases.policy(config_of(family), "cuda", dtype))
    print(f"{family} {dtype}: largest difference of log-probs {apart:.2g}")
    assert apart < most


HEADS = [(8, 4, 128), (2, 7, 64), (4, 1, 64), (8, 2, 128), (8, 3, 128), (1, 4, 256), (4, 2, 256)]
"""Key heads, query heads of each, their size: of Llama 3.1 8B, Qwen 2.5 0.5B, one query head each, Qwen 3 1.7B,
Phi-4-mini, Gemma 3 1B and 4B."""


@pytest.mark.parametrize(("key_heads", "query_heads", "size"), HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_attention_reads_true_lengths_of_shared_prompts(
    dtype: torch.dtype, key_heads: int, query_heads: int, size: int
) -> None:
    device = torch.device("cuda")
    flash = FlashOverSlots(ROWS, LONGEST, device)
    assert difference(flash, device, dtype, key_heads, query_heads, size) <= CLOSE


@pytest.mark.parametrize("most", [LONGEST, 8 * LONGEST])
@pytest.mark.parametrize(("key_heads", "query_heads", "size"), HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_attention_in_triton_reads_true_lengths_of_shared_prompts(
    dtype: torch.dtype, key_heads: int, query_heads: int, size: int, most: int
) -> None:
    """In short chunks of a stretch, and in one that is longer than the stretch."""
    pytest.importorskip("triton")
    from dppo_cli.kernels.fused import attention

    device = torch.device("cuda")
    assert attention.difference(device, dtype, key_heads, query_heads, size) <= CLOSE
    split = attention.SplitAttention(most, most)
    assert difference(split, device, dtype, key_heads, query_heads, size) <= CLOSE


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("adapter", ["lora", "qlora"])
@torch.inference_mode()
def test_a_step_does_not_wait_for_the_device(config_of, adapter: str) -> None:
    of = decode_cases.policy(config_of("blocks", f"adapter={adapter}", "rollout.weights=auto"), "cuda", "bfloat16")
    head = model_head(of.model)
    sampler = Sampler(of.model, head, head.product, of.autocast)
    how = decode_cases.Sampling(0.7, 0.9, 5, 0.0, 8, [])
    with of.autocast():
        found = prefill(sampler, make.prompts(of), of.pad_id, of.device)
        sequences = StaticSequences(sampler, Room(4, 64, 8, 16), of.eos_ids, found, make.fail)
        sequences.begin(sampler, how, 4)
        places, slots = torch.arange(4, device="cuda"), torch.arange(8, device="cuda")
        uniform_NT = torch.rand(8, 8, device="cuda")

        def put() -> None:
            sequences.put_prompts(places, found)
            sequences.put(slots, slots % 4, uniform_NT)

        put()
        sequences.step(8, 16)  # libraries are loaded
        try:
            torch.cuda.set_sync_debug_mode("error")
            sequences.step(8, 16)
            put()
            sequences.move(slots[6:], slots[:2], 16)
            ends = sequences.ends()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(ends.read()[0]) == 8


def test_memory_is_given_back(config_of) -> None:
    of = decode_cases.policy(config_of("llama"), "cuda", "bfloat16")
    decode_cases.graphs_and_calls(of, 0)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    decode_cases.graphs_and_calls(of, 0)
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before
