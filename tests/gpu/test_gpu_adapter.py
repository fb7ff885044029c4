"""The adapter's addition for several layers in one launch, on a GPU. `make test-gpu`."""

import adapter_cases
import pytest
import torch

pytest.importorskip("triton")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("sizes", "rank"), adapter_cases.SHAPES, ids=str)
def test_additions(sizes: tuple[int, ...], rank: int, dtype: torch.dtype) -> None:
    rows = (1, 8, 32, 100, 513)
    print(adapter_cases.it_is_as_exact_as_one_addition_for_each_layer("cuda", dtype, sizes, rank, rows))
