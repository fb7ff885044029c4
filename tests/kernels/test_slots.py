"""A step over slots against the plain decoder, with prompts that several slots read and slots that change hands."""

import copy

import make
import pytest
import torch
from plain_flash import plain_flash
from recording import addresses
from test_token_step import FAMILIES, WINDOWS, model

from dppo_cli.kernels import flash as of_torch
from dppo_cli.kernels import slots
from dppo_cli.kernels.flash import CLOSE, LONGEST, FlashOverSlots, difference, merged
from dppo_cli.kernels.slots import Decoding, Room, SlotStates
from dppo_cli.rollout.decoder import Decoder

PROMPTS = ((5, 6, 7, 8, 9), (10,), (12, 13, 14))
ROOM = Room(prompts=4, prompt_positions=6, slots=5, positions=8)
PLACES = (3, 0, 2)
"""Of each prompt; place 1 is free."""
SEQUENCES = {3: 0, 0: 1, 2: 2, 4: 0}
"""The prompt of each slot: slots 3 and 4 read the same one, slot 1 is free."""
ROWS = list(SEQUENCES)


def prefilled(of, token_ids) -> Decoder:
    decoder = Decoder(of, [make.prompt(0, token_ids)], 1, 8, 0)
    decoder.prefill()
    return decoder


def filled(of) -> tuple[Decoding, dict[int, Decoder]]:
    """Places of what each of `PROMPTS` left in a decoder of its own; and such a decoder for each slot."""
    plain = [prefilled(of, ids) for ids in PROMPTS]
    like = [layer.keys.transpose(1, 2) for layer in plain[0].cache.layers]
    decoding = Decoding(of, ROOM, like, make.fail)
    for place, decoder in zip(PLACES, plain, strict=True):
        for states, layer in zip(decoding.states, decoder.cache.layers, strict=True):
            states.put(torch.tensor([place]), layer.keys.transpose(1, 2), layer.values.transpose(1, 2))
    return decoding, {slot: prefilled(of, PROMPTS[prompt]) for slot, prompt in SEQUENCES.items()}


def of_rows() -> tuple[torch.Tensor, torch.Tensor]:
    """Each slot's place, and its prompt's length."""
    place_S, prompt_S = torch.zeros(5, dtype=torch.int64), torch.ones(5, dtype=torch.int64)
    for slot, prompt in SEQUENCES.items():
        place_S[slot], prompt_S[slot] = PLACES[prompt], len(PROMPTS[prompt])
    return place_S, prompt_S


NONE = torch.zeros(5, dtype=torch.int64)
"""Tokens that slots have at the beginning."""
TOKENS = torch.tensor([20, 21, 22, 23, 24])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, *WINDOWS])
@torch.inference_mode()
def test_a_step_is_that_of_the_plain_decoder(family, dtype):
    of = model({**FAMILIES, **WINDOWS}[family]).to(dtype)
    decoding, plain = filled(of)
    # transformers computes norms and rotary frequencies in float32 whatever the weights are.
    close = {
        torch.float32: dict(rtol=1e-5, atol=1e-5),
        torch.float64: dict(rtol=1e-6, atol=1e-6),
        torch.bfloat16: dict(rtol=0.05, atol=0.05),
    }[dtype]
    length_S, generator = NONE.clone(), torch.Generator().manual_seed(0)
    for width in (1, 2, 8, 8, 8, 8, 8, 8):  # until a window of 6 has passed the prompts
        token_S = torch.randint(3, 96, (5,), generator=generator)
        found_SH = decoding.step(token_S, *of_rows(), length_S, width)
        length_S += 1
        assert found_SH.dtype == dtype
        for slot, decoder in plain.items():
            torch.testing.assert_close(found_SH[slot], decoder.step(token_S[slot : slot + 1])[0], **close)


@torch.inference_mode()
def test_what_another_sequence_left_does_not_matter():
    """Behind a prompt, behind a response, in places and slots of others."""
    of = model(FAMILIES["qwen3"])
    clean, _ = filled(of)
    used = copy.deepcopy(clean)
    places, own = torch.ones(4, 6, dtype=torch.bool), torch.ones(5, 8, dtype=torch.bool)
    for place, ids in zip(PLACES, PROMPTS, strict=True):
        places[place, : len(ids)] = False
    behind = torch.cat([places.flatten(), own.flatten()])
    for states in used.states:
        for pool in (states.keys, states.values):
            pool[behind] = 100 * torch.randn(int(behind.sum()), *pool.shape[1:])
    expected, found = (decoding.step(TOKENS, *of_rows(), NONE, 8)[ROWS] for decoding in (clean, used))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@torch.inference_mode()
def test_a_sequence_goes_on_in_another_slot():
    of = model(FAMILIES["llama3"])
    decoding, plain = filled(of)
    place_S, prompt_S = of_rows()
    decoding.step(TOKENS, place_S, prompt_S, NONE, 8)
    plain[3].step(TOKENS[3:4])
    for states in decoding.states:
        states.move(torch.tensor([3]), torch.tensor([1]), width=1)
    place_S[1], prompt_S[1] = place_S[3], prompt_S[3]
    found_H = decoding.step(torch.tensor([5, 30, 6, 7, 8]), place_S, prompt_S, NONE + 1, 8)[1]
    torch.testing.assert_close(found_H, plain[3].step(torch.tensor([30]))[0], rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_first_rows_alone_take_part():
    of = model(FAMILIES["llama3"])
    decoding, plain = filled(of)
    two = ROOM.of_prompts + 2 * ROOM.positions
    before = [states.keys.clone() for states in decoding.states]
    found_RH = decoding.step(TOKENS[:2], *(t[:2] for t in of_rows()), NONE[:2], 8)
    assert found_RH.shape[0] == 2
    torch.testing.assert_close(found_RH[0], plain[0].step(TOKENS[:1])[0], rtol=1e-5, atol=1e-5)
    for states, keys in zip(decoding.states, before, strict=True):
        assert torch.equal(states.keys[: ROOM.of_prompts], keys[: ROOM.of_prompts])
        assert torch.equal(states.keys[two:], keys[two:]) and not torch.equal(states.keys, keys)


@torch.inference_mode()
def test_keys_and_values_stay_where_they_are():
    decoding, _ = filled(model(FAMILIES["llama"]))
    pools = [pool for states in decoding.states for pool in (states.keys, states.values)]
    before = addresses(*pools)
    for width in (4, 8):
        decoding.step(TOKENS, *of_rows(), NONE, width)
    for states in decoding.states:
        states.put(torch.tensor([1]), torch.ones(1, 6, 2, 8), torch.ones(1, 6, 2, 8))
        states.move(torch.tensor([3]), torch.tensor([1]), 8)
    assert [pool.data_ptr() for states in decoding.states for pool in (states.keys, states.values)] == before


def test_new_slots_hold_no_invalid_numbers():
    """What is masked out is still multiplied, by zero."""
    states = SlotStates(ROOM, torch.full((1, 2, 2, 4), float("nan")))
    assert not states.keys.any() and not states.values.any()


def test_room_is_for_places_and_slots():
    assert (ROOM.of_prompts, ROOM.all_positions) == (24, 64)
    assert SlotStates(ROOM, torch.zeros(1, 2, 2, 4)).keys.shape == (64, 2, 4)
    other = Room(prompts=9, prompt_positions=3, slots=2, positions=16)
    assert ROOM.with_room_for(other) == other.with_room_for(ROOM) == Room(9, 6, 5, 16)
    assert ROOM.with_room_for(Room(1, 1, 1, 1)) == ROOM


# The faster attention, as far as it can be without a GPU


@pytest.mark.parametrize("family", ["llama3", *WINDOWS])
@torch.inference_mode()
def test_flash_gets_true_lengths_and_offsets(monkeypatch, family):
    of = model({**FAMILIES, **WINDOWS}[family])
    plain, _ = filled(of)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", plain_flash)
    monkeypatch.setattr(slots, "has_flash", lambda *_: True)
    flash, _ = filled(of)
    windows = {"llama3": {None}, "mistral with a window": {6}}.get(family, {None, 6})
    assert not plain.flash and flash.flash.keys() == windows
    assert all(isinstance(attention, FlashOverSlots) for attention in flash.flash.values())
    for rows, length in ((5, 0), (5, 1), (2, 2), (5, 3), (5, 4), (5, 5), (5, 6)):
        of_row = (TOKENS[:rows], *(t[:rows] for t in of_rows()), NONE[:rows] + length, 8)
        expected, found = (decoding.step(*of_row) for decoding in (plain, flash))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_two_parts_of_an_attention_are_one():
    """In float64, for scores of any size, where one part has all of the weight, too."""
    generator = torch.Generator().manual_seed(0)
    scores, values = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4, 9), (9, 8)))
    scores *= torch.tensor([1.0, 30.0, 1000.0])[:, None, None]
    parts = [
        (scores[..., of].softmax(-1) @ values[of], scores[..., of].logsumexp(-1)) for of in (slice(5), slice(5, 9))
    ]
    found = merged(torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts]).t())
    torch.testing.assert_close(found, scores.softmax(-1) @ values, rtol=1e-12, atol=1e-12)


def flash() -> FlashOverSlots:
    return FlashOverSlots(of_torch.ROWS, LONGEST, torch.device("cpu"))


def broken(how: str):
    """A kernel that does not do what it is asked."""

    def run(*args, **more):
        args = list(args)
        if how == "refuses":
            raise RuntimeError("FlashAttention only supports Ampere GPUs or newer.\nmore")
        if how == "ignores the lengths":
            more["seqused_k"] = torch.full_like(more["seqused_k"], args[6])
        if how == "one position less":
            more["seqused_k"] = more["seqused_k"] - 1
        if how == "takes offsets as ascending":
            args[4] = torch.arange(len(args[4]), dtype=torch.int32) * args[6]
        if how == "another place":
            args[4] = args[4].roll(1)
        found, lse, _ = plain_flash(*args, **more)
        if how == "no log-sum-exp":
            lse = torch.zeros_like(lse)
        if how == "heads of the log-sum-exp in another order":
            lse = lse.unflatten(0, (args[1].shape[1], -1)).transpose(0, 1).reshape(lse.shape)
        return found, lse, None

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("key_heads", "query_heads", "size"), [(8, 4, 128), (2, 7, 64), (4, 1, 64)])
def test_a_kernel_that_works_is_found_to(monkeypatch, key_heads, query_heads, size, dtype):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", plain_flash)
    apart = difference(flash(), torch.device("cpu"), dtype, key_heads, query_heads, size)
    assert 0 < apart <= CLOSE


WAYS = ("ignores the lengths", "one position less", "takes offsets as ascending", "another place", "no log-sum-exp")


@pytest.mark.parametrize("how", [*WAYS, "heads of the log-sum-exp in another order"])
def test_a_kernel_that_does_not_is_found_out(monkeypatch, how):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", broken(how))
    assert not difference(flash(), torch.device("cpu"), torch.float16, 2, 4, 16) <= 10 * CLOSE


@pytest.mark.parametrize("how", ["ignores the lengths", "refuses"])
@torch.inference_mode()
def test_a_flash_kernel_that_does_not_work_is_not_used_and_that_is_said(monkeypatch, how):
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", broken(how))
    monkeypatch.setattr(slots, "has_flash", lambda *_: True)
    of, warnings = model(FAMILIES["llama3"]), []
    like = [layer.keys.transpose(1, 2) for layer in prefilled(of, PROMPTS[0]).cache.layers]
    assert not Decoding(of, ROOM, like, warnings.append).flash
    (text,) = warnings
    assert text.startswith("attention reads more of the cache than is in use, because torch's flash kernel does not")
    assert text.endswith("FlashAttention only supports Ampere GPUs or newer." if how == "refuses" else " off")
