"""A step over slots against the plain decoder, with sequences of different lengths and slots that change hands."""

import copy

import make
import pytest
import tiny
import torch
from recording import addresses
from test_llama import FAMILIES, model
from transformers import LlamaConfig, Phi3Config

from dppo_cli.kernels import slots
from dppo_cli.kernels.flash import FlashOverSlots
from dppo_cli.kernels.slots import Decoding, SlotStates, has_fixed_frequencies
from dppo_cli.rollout.decoder import Decoder

PROMPTS = ((5, 6, 7, 8, 9), (10, 11), (12, 13, 14))
SLOTS = (3, 0, 2)
"""Of each prompt; slot 1 is free."""
CAPACITY = 16


def prefilled(of, token_ids) -> Decoder:
    decoder = Decoder(of, [make.prompt(0, token_ids)], 1, 8, 0)
    decoder.prefill()
    return decoder


def filled(of) -> tuple[Decoding, list[Decoder]]:
    """Slots of what each of `PROMPTS` left in a decoder of its own."""
    plain = [prefilled(of, ids) for ids in PROMPTS]
    like = [layer.keys.transpose(1, 2) for layer in plain[0].cache.layers]
    decoding = Decoding(of, 4, CAPACITY, like, make.fail)
    for slot, decoder in zip(SLOTS, plain, strict=True):
        for states, layer in zip(decoding.states, decoder.cache.layers, strict=True):
            states.put(torch.tensor([slot]), layer.keys.transpose(1, 2), layer.values.transpose(1, 2))
    return decoding, plain


def lengths() -> torch.Tensor:
    length_S = torch.zeros(4, dtype=torch.int64)
    length_S[list(SLOTS)] = torch.tensor([len(ids) for ids in PROMPTS])
    return length_S


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", list(FAMILIES))
@torch.inference_mode()
def test_a_step_is_that_of_the_plain_decoder(family, dtype):
    of = model(FAMILIES[family]).to(dtype)
    decoding, plain = filled(of)
    # transformers computes norms and rotary frequencies in float32 whatever the weights are.
    close = {
        torch.float32: dict(rtol=1e-5, atol=1e-5),
        torch.float64: dict(rtol=1e-6, atol=1e-6),
        torch.bfloat16: dict(rtol=0.05, atol=0.05),
    }[dtype]
    length_S, generator = lengths(), torch.Generator().manual_seed(0)
    for width in (8, 8, 16, CAPACITY):
        token_S = torch.randint(3, 96, (4,), generator=generator)
        found_SH = decoding.step(token_S, length_S, width)
        length_S += 1
        assert found_SH.dtype == dtype
        for slot, decoder in zip(SLOTS, plain, strict=True):
            torch.testing.assert_close(found_SH[slot], decoder.step(token_S[slot : slot + 1])[0], **close)


@torch.inference_mode()
def test_what_another_sequence_left_in_a_slot_does_not_matter():
    of = model(FAMILIES["qwen3"])
    clean, _ = filled(of)
    used = copy.deepcopy(clean)
    behind = torch.arange(CAPACITY) >= lengths()[:, None]
    for states in used.states:
        for pool in (states.keys, states.values):
            pool[behind] = 100 * torch.randn(int(behind.sum()), *pool.shape[2:])
    token_S = torch.tensor([20, 21, 22, 23])
    rows = list(SLOTS)
    expected, found = (decoding.step(token_S, lengths(), 16)[rows] for decoding in (clean, used))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@torch.inference_mode()
def test_a_sequence_goes_on_in_another_slot():
    of = model(FAMILIES["llama3"])
    decoding, plain = filled(of)
    decoding.step(torch.tensor([20, 21, 22, 23]), lengths(), 8)
    plain[0].step(torch.tensor([23]))
    for states in decoding.states:
        states.move(torch.tensor([3]), torch.tensor([1]), width=6)
    length_S = torch.tensor([3, 6, 4, 0])
    found_H = decoding.step(torch.tensor([5, 30, 6, 7]), length_S, 8)[1]
    torch.testing.assert_close(found_H, plain[0].step(torch.tensor([30]))[0], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_first_rows_alone_take_part():
    of = model(FAMILIES["llama3"])
    decoding, plain = filled(of)
    before = [states.keys[2:].clone() for states in decoding.states]
    found_RH = decoding.step(torch.tensor([20, 21]), lengths()[:2], 8)
    assert found_RH.shape[0] == 2
    torch.testing.assert_close(found_RH[0], plain[1].step(torch.tensor([20]))[0], rtol=1e-5, atol=1e-5)
    assert all(torch.equal(s.keys[2:], keys) for s, keys in zip(decoding.states, before, strict=True))


@torch.inference_mode()
def test_keys_and_values_stay_where_they_are():
    decoding, _ = filled(model(FAMILIES["llama"]))
    pools = [pool for states in decoding.states for pool in (states.keys, states.values)]
    before = addresses(*pools)
    for width in (8, 16):
        decoding.step(torch.tensor([20, 21, 22, 23]), lengths(), width)
    for states in decoding.states:
        states.move(torch.tensor([3]), torch.tensor([1]), 8)
    assert [pool.data_ptr() for states in decoding.states for pool in (states.keys, states.values)] == before


def test_new_slots_hold_no_invalid_numbers():
    """What is masked out is still multiplied, by zero."""
    states = SlotStates(3, 8, torch.full((1, 2, 2, 4), float("nan")))
    assert not states.keys.any() and not states.values.any()


@pytest.mark.parametrize("family", list(FAMILIES))
def test_frequencies_are_fixed_in(family):
    assert has_fixed_frequencies(model(FAMILIES[family]))


def test_frequencies_that_follow_the_longest_sequence_are_not():
    dynamic = dict(rope_type="dynamic", rope_theta=10000.0, factor=4.0)
    assert not has_fixed_frequencies(model(LlamaConfig(**tiny.GROUPED, vocab_size=96, rope_parameters=dynamic)))
    longrope = dict(rope_type="longrope", rope_theta=10000.0, short_factor=[1.0] * 4, long_factor=[2.0] * 4)
    config = Phi3Config(
        **tiny.GROUPED, vocab_size=96, pad_token_id=0, rope_parameters=longrope, original_max_position_embeddings=64
    )
    assert not has_fixed_frequencies(model(config))


# The faster attention, as far as it can be without a GPU


def plain_flash(q, k, v, q_start, k_start, max_q, max_k, dropout, causal, debug, *, scale, seqused_k):
    """What torch's kernel computes with these arguments, row by row."""
    assert (max_q, dropout, causal, debug) == (1, 0.0, False, False) and q_start.dtype == seqused_k.dtype == torch.int32
    assert q_start.tolist() == list(range(len(q) + 1)) and max(seqused_k.tolist()) <= max_k
    found = []
    for row, (start, used) in enumerate(zip(k_start.tolist(), seqused_k.tolist(), strict=False)):
        keys, values = (
            states[start : start + used].repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v)
        )
        weights = (torch.einsum("hd,xhd->hx", q[row], keys) * scale).softmax(-1)
        found.append(torch.einsum("hx,xhd->hd", weights, values))
    return torch.stack(found), None


@torch.inference_mode()
def test_flash_gets_true_lengths_and_offsets(monkeypatch):
    of = model(FAMILIES["llama3"])
    plain, _ = filled(of)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", plain_flash)
    monkeypatch.setattr(slots, "has_flash", lambda *_: True)
    flash, _ = filled(of)
    assert plain.flash is None and isinstance(flash.flash, FlashOverSlots)
    token_S = torch.tensor([20, 21, 22, 23])
    expected, found = (decoding.step(token_S, lengths(), 8) for decoding in (plain, flash))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected, found = (decoding.step(token_S[:2], lengths()[:2] + 1, 8) for decoding in (plain, flash))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", ["ignores the lengths", "refuses"])
@torch.inference_mode()
def test_a_flash_kernel_that_does_not_work_is_not_used_and_that_is_said(monkeypatch, how):
    def broken(*args, **more):
        if how == "refuses":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")
        more["seqused_k"] = torch.full_like(more["seqused_k"], args[6])
        return plain_flash(*args, **more)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", broken)
    monkeypatch.setattr(slots, "has_flash", lambda *_: True)
    of, warnings = model(FAMILIES["llama3"]), []
    like = [layer.keys.transpose(1, 2) for layer in prefilled(of, PROMPTS[0]).cache.layers]
    assert Decoding(of, 4, CAPACITY, like, warnings.append).flash is None
    (text,) = warnings
    assert text.startswith("attention reads more of the cache than is in use, because torch's flash kernel does not")
    assert text.endswith("FlashAttention only supports Ampere GPUs or newer." if how == "refuses" else " off")
