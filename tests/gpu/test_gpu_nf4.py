"""Products with 4-bit weights on a GPU. `make test-gpu`."""

from pathlib import Path

import nf4_cases
import pytest
import tiny_models
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")]


@pytest.mark.parametrize(("sizes", "inputs"), nf4_cases.LLAMA_8B, ids=["qkv", "o", "gate up", "down"])
def test_products_in_the_shapes_of_llama(sizes: tuple[int, ...], inputs: int) -> None:
    print(nf4_cases.products_are_as_exact_as_bitsandbytes("cuda", torch.bfloat16, sizes, inputs, (8, 64, 256)))


@pytest.mark.parametrize(("sizes", "inputs"), [((192, 64, 72), 192), ((896, 128, 128), 896)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_other_shapes(dtype: torch.dtype, sizes: tuple[int, ...], inputs: int) -> None:
    print(nf4_cases.products_are_as_exact_as_bitsandbytes("cuda", dtype, sizes, inputs, (1, 3, 17, 32, 100, 200)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("outputs", "inputs"), [(4096, 4096), (192, 192)])
def test_weights_are_decoded_bit_for_bit(outputs: int, inputs: int, dtype: torch.dtype) -> None:
    nf4_cases.weights_are_decoded_bit_for_bit("cuda", dtype, outputs, inputs)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_the_sampler_agrees_with_the_trainer(family: str, train_config, tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / family, family, **tiny_models.BLOCKS)
    words = ("adapter=qlora", "rollout.weights=quantized", "sampling.max_new_tokens=32", f"model.path={folder}")
    apart, own, launches = nf4_cases.sampler_agrees_with_the_trainer(train_config(*words), "cuda", "bfloat16")
    print(f"{family}: mean |pi - mu| {apart:.2g}, the trainer's own {own:.2g}")
    assert launches > 0
