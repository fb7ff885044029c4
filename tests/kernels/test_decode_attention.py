"""The attention of a decoding step in Triton, and the writing of its keys and values, against plain operations."""

import interpreted
import pytest
import torch
from compiled import taken
from test_slots import NONE, ROOM, TOKENS, filled, of_rows
from test_token_step import model
from transformers import LlamaConfig, MistralConfig

from dppo_cli.kernels import flash, slots
from dppo_cli.kernels.flash import CLOSE, LONGEST, difference
from dppo_cli.kernels.slots import write_each

attention = interpreted.kernels("attention")
SplitAttention, write = attention.SplitAttention, attention.write
HALVES = (torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
SIZE = 16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def looked(own: tuple[int, ...], places: tuple[int, ...], lengths: tuple[int, ...], most: int) -> tuple:
    """What `look` is told of slots behind `len(lengths)` places, all of `most` positions, of which `own` are in use."""
    place_R = torch.tensor(places)
    own_R = (torch.arange(len(own)) + len(lengths)) * most
    return place_R * most, own_R, torch.tensor(lengths)[place_R], torch.tensor(own)


def plain(q_RKQD, keys_MKD, values_MKD, stretches, scale) -> torch.Tensor:
    """In float64, row by row."""
    found = []
    for q, *of in zip(q_RKQD, *(x.tolist() for x in stretches), strict=True):
        prompt, own, prompt_used, own_used = of
        at = [*range(prompt, prompt + prompt_used), *range(own, own + own_used)]
        scores = torch.einsum("kqd,xkd->kqx", q.double(), keys_MKD[at].double()) * scale
        found.append(torch.einsum("kqx,xkd->kqd", scores.softmax(-1), values_MKD[at].double()))
    return torch.stack(found)


def pools(places: int, key_heads: int, most: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [random(places * most, key_heads, SIZE, seed=seed).to(dtype) for seed in (1, 2)]


@pytest.mark.parametrize("windows", [False, True], ids=["", "windows"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("key_heads", "query_heads"), [(2, 4), (1, 7), (3, 1), (1, 16)])
def test_it_is_attention_to_both_stretches(key_heads, query_heads, dtype, windows):
    stretches = looked(own=(1, 70, 150, 128), places=(1, 0, 0, 1), lengths=(150, 64), most=150)
    if windows:  # behind which the second row sees nothing of its prompt
        past, own_past = torch.tensor([0, 150, 30, 0]), torch.tensor([0, 20, 0, 0])
        stretches = (stretches[0] + past, stretches[1] + own_past, stretches[2] - past, stretches[3] - own_past)
    q = random(4, key_heads, query_heads, SIZE).to(dtype)
    keys, values = pools(6, key_heads, 150, dtype)
    split = SplitAttention(150, 150)
    split.look(*stretches)
    found = split(q, keys, values, None, scale=0.3)
    assert found.dtype == dtype and found.is_contiguous()
    expected = plain(q, keys, values, stretches, 0.3)
    close = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=close, atol=close)


@pytest.mark.parametrize(("query_heads", "size"), [(4, 16), (7, 64)])
def test_the_probe_finds_that_it_works(query_heads, size):
    assert 0 < attention.difference(CPU, torch.bfloat16, 1, query_heads, size) <= CLOSE


def test_what_is_behind_a_stretch_is_not_read():
    stretches = looked(own=(1, 65), places=(0, 0), lengths=(3,), most=80)
    q = random(2, 2, 4, SIZE).bfloat16()
    split = SplitAttention(80, 80)
    split.look(*stretches)
    clean = pools(3, 2, 80, torch.bfloat16)
    expected = split(q, *clean, None, 0.25)
    for pool in clean:
        for start, used in ((0, 3), (80, 1), (160, 65)):
            pool[start + used : start + 80] = float("nan")
    assert torch.equal(split(q, *clean, None, 0.25), expected)


@pytest.mark.parametrize("query_heads", [1, 4, 7])
def test_a_row_does_not_depend_on_the_others(query_heads):
    """Beside those that share its prompt and others, and alone: bit for bit."""
    stretches = looked(own=(9, 1, 40, 66, 2), places=(0, 1, 0, 1, 1), lengths=(80, 5), most=80)
    q = random(5, 2, query_heads, SIZE).bfloat16()
    keys, values = pools(7, 2, 80, torch.bfloat16)
    split = SplitAttention(80, 80)
    split.look(*stretches)
    together = split(q, keys, values, None, 0.25)
    for row in range(5):
        split.look(*(x[row : row + 1] for x in stretches))
        assert torch.equal(split(q[row : row + 1], keys, values, None, 0.25)[0], together[row])


def test_a_long_stretch_has_long_chunks():
    """As many chunks as before, and the same result as of shorter ones."""
    assert [attention.chunk_of(n) for n in (1, 128, 1024, 1025, 2048, 8193)] == [128, 128, 128, 256, 256, 1152]
    stretches = looked(own=(140,), places=(0,), lengths=(290,), most=300)
    q, (keys, values) = random(1, 1, 4, SIZE).half(), pools(2, 1, 300, torch.float16)
    for split in (SplitAttention(3000, 1025), SplitAttention(300, 300)):
        split.look(*stretches)
        found = split(q, keys, values, None, 0.25)
        expected = plain(q, keys, values, stretches, 0.25)
        torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)


def test_large_scores_are_exact():
    """One position has all of the weight; weights of the others would overflow without a maximum."""
    stretches = looked(own=(66,), places=(0,), lengths=(130,), most=130)
    keys, values = pools(2, 1, 130, torch.bfloat16)
    q = keys[7].unsqueeze(1).expand(1, 1, 4, SIZE) * 100
    split = SplitAttention(130, 130)
    split.look(*stretches)
    torch.testing.assert_close(split(q, keys, values, None, 1.0)[0, 0], values[7].expand(4, SIZE))


@pytest.mark.parametrize("break_it", ["a chunk less", "lengths of neighbours", "no chunk weights"])
def test_the_probe_finds_out_what_does_not_work(monkeypatch, break_it):
    split = SplitAttention(LONGEST, LONGEST)
    if break_it == "a chunk less":
        split.prompt_chunks -= 1
        split.chunks -= 1
    elif break_it == "lengths of neighbours":
        look = split.look
        monkeypatch.setattr(split, "look", lambda p, o, n, m: look(p, o, n.roll(1), m))
    else:
        plain_sum = attention.sum_chunks

        class Unweighted:
            def __getitem__(self, grid):
                return lambda part, lse, *of, **how: plain_sum[grid](part, lse.where(lse.isinf(), 0), *of, **how)

        monkeypatch.setattr(attention, "sum_chunks", Unweighted())
    assert not difference(split, CPU, torch.bfloat16, 1, 4, SIZE) <= 5 * CLOSE


# Writing


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("key_heads", [1, 3])
def test_keys_and_values_are_written_as_they_are(key_heads, dtype):
    joined = random(4, 5 * key_heads * SIZE).to(dtype)
    keys = random(4, key_heads, SIZE, seed=1).to(dtype).unsqueeze(2)
    values = joined[:, -key_heads * SIZE :].view(4, key_heads, 1, SIZE)
    at_R = torch.tensor([7, 0, 8, 3])
    found, expected = (pools(1, key_heads, 9, dtype) for _ in range(2))
    write(*found, at_R, keys, values)
    write_each(*expected, at_R, keys, values)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("pool", [0, 1])
def test_the_probe_finds_out_what_is_written_wrongly(monkeypatch, pool):
    def wrong(*of):
        write_each(*of)
        of[pool][0] = 1

    monkeypatch.setattr(attention, "write", wrong)
    assert attention.difference(CPU, torch.bfloat16, 1, 4, SIZE) == float("inf")


# In a decoding step


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as slots.py knows."""
    monkeypatch.setattr(slots, "has_flash", lambda *_: True)
    monkeypatch.setattr(slots, "without_triton", lambda *_: None)


def sizes(head: int) -> dict[str, int]:
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=head)
    return dict(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, **heads)


def llama(size: int) -> LlamaConfig:
    return LlamaConfig(**sizes(size))


@pytest.mark.parametrize("window", [None, 6])
@torch.inference_mode()
def test_a_step_with_it_is_that_of_the_masked_attention(on_gpu, monkeypatch, window):
    of = model(MistralConfig(**sizes(64), sliding_window=window)).bfloat16()
    split, _ = filled(of)
    assert isinstance(split.flash[window], SplitAttention) and all(states.write is write for states in split.states)
    monkeypatch.setattr(slots, "has_flash", lambda *_: False)
    plain, _ = filled(of)
    assert not plain.flash
    for rows, length in ((5, 0), (5, 1), (2, 2), (5, 3), (5, 4), (5, 5), (5, 6)):
        of_row = (TOKENS[:rows], *(t[:rows] for t in of_rows()), NONE[:rows] + length, 8)
        expected, found = (decoding.step(*of_row) for decoding in (plain, split))
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def asked(of, warnings: list[str]) -> tuple:
    like = torch.zeros(1, 2, 2, of.config.head_dim, dtype=torch.bfloat16)
    return slots.over_slots(ROOM, of.config.num_attention_heads, like, warnings.append)


@pytest.mark.parametrize(
    ("size", "why", "words"),
    [(64, "", []), (8, None, []), (64, "Triton is not installed", ["Triton is not installed"])],
)
def test_torchs_kernel_is_the_next_choice(on_gpu, monkeypatch, size, why, words):
    """Where Triton is not for the device, where the kernel is not for the model, and where Triton is missing."""
    monkeypatch.setattr(slots, "without_triton", lambda *_: why)
    monkeypatch.setattr(slots, "difference", lambda *_: 0.0)
    warnings: list[str] = []
    found, how = asked(model(llama(size)), warnings)
    assert isinstance(found(), flash.FlashOverSlots) and how is write_each
    assert warnings == [slots.WITHOUT_SPLIT.format(word) for word in words]


def test_a_kernel_that_does_not_work_is_not_used_and_that_is_said(on_gpu, monkeypatch):
    monkeypatch.setattr(attention, "difference", lambda *_: 0.3)
    monkeypatch.setattr(slots, "difference", lambda *_: 0.0)
    warnings: list[str] = []
    found, _ = asked(model(llama(64)), warnings)
    assert isinstance(found(), flash.FlashOverSlots)
    assert warnings == [slots.WITHOUT_SPLIT.format("its results are 0.3 off")]


@pytest.mark.parametrize(
    ("shape", "right"),
    [((4, 128), True), ((7, 64), True), ((16, 64), True), ((17, 64), False), ((4, 96), False), ((4, 256), True)],
)
def test_heads_that_it_is_for(shape, right):
    assert attention.supports(*shape) is right


# For GPUs that are not there


def test_nothing_spills_and_three_programs_fit():
    """By registers, of 65,536, and by shared memory: of 228 KiB on an H100, and of 164 on an A100, where two fit."""
    found = taken("specimens_attention")
    for name, each in found.items():
        for capability, of in each.items():
            assert of["spilled"] == 0 and 3 * 128 * of["registers"] <= 65536, (name, capability, of)
            # The driver takes 1 KiB for each program.
            most = 228 // 3 if capability == "90" else 164 // 2
            assert of["shared"] + 1024 <= most * 1024, (name, capability, of)
