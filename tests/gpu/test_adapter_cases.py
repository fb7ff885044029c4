"""The check of tests/gpu/test_gpu_adapter.py in Triton's interpreter: that it finds what is right, and what is not."""

import adapter_cases
import interpreted
import pytest
import torch

adapter_up = interpreted.kernels("adapter_up")


def test_additions(monkeypatch: pytest.MonkeyPatch) -> None:
    of = ("cpu", torch.bfloat16, (100, 72), 4, (1, 17))
    assert max(adapter_cases.it_is_as_exact_as_one_addition_for_each_layer(*of).values()) < 0.1
    add_up = adapter_up.add_up
    monkeypatch.setattr(adapter_up, "add_up", lambda out, b, sizes, s: add_up(out, b, sizes, [1.01 * one for one in s]))
    with pytest.raises(AssertionError, match="1 rows: mean error"):
        adapter_cases.it_is_as_exact_as_one_addition_for_each_layer(*of)
