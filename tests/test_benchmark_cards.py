"""The limits of the GPU benchmark's cards. What is measured within them is in test_benchmark_gpu.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dppo_cli.rollout import refill, weights

GIB = 2**30


def test_what_is_decided_by_memory_is_decided_by_that_of_the_card(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card with five times as much."""
    cards, shares = script("gpu_cards"), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", shares.append)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6 * GIB)
    kept, free, device = refill.KEPT, weights._free_bytes, torch.device("cuda")
    with cards.limited(device, 16.0):
        assert weights._free_bytes(device) == 10 * GIB and pytest.approx(kept / 5) == refill.KEPT
    assert shares == [pytest.approx(0.2), 1.0] and (refill.KEPT, weights._free_bytes) == (kept, free)
    for unlimited in (cards.limited(device, None), cards.limited(torch.device("cpu"), 16.0)):
        with unlimited:
            assert (refill.KEPT, weights._free_bytes) == (kept, free)
    assert len(shares) == 2


def test_the_policy_of_a_card_is_what_its_options_ask_for(script: Any) -> None:
    cards, model = script("gpu_cards"), script("gpu_model")
    slots = []
    for policy, words, _ in cards.CARDS.values():
        made, asked = model.config(model.LLAMA_8B, *policy), model.config(model.LLAMA_8B, *words)
        assert made.adapter == asked.adapter
        assert made.hardware.gradient_checkpointing == asked.hardware.gradient_checkpointing
        slots.append(asked.rollout.concurrent_sequences)
    assert slots == [16, 32, 160]
