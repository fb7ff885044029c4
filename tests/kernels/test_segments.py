"""Attention over a row of segments, against a softmax under a dense mask."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dppo_cli.kernels import segment_kernels as module
from dppo_cli.kernels.segment_kernels import CLOSE, FlashOnCPU, FlashOnCUDA, Pairs, Plain, choose_kernel, difference
from dppo_cli.kernels.segments import Segments, attend

ROWS = {
    "one group": Segments((5,), ((3, 7, 1),)),
    "groups of different sizes": Segments((5, 1, 8), ((3, 7, 1), (2,), (6, 4))),
    "a prompt without a response": Segments((5, 2, 4), ((3, 7), (1,), ())),
    "prompts alone": Segments((5, 2), ((), ())),
}
HEADS = [(4, 4), (6, 2), (3, 1)]
SCALE, SIZE = 0.3, 16

rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)


def tokens(row: Segments) -> int:
    return sum(row.prompts) + sum(map(sum, row.responses))


def inputs(row: Segments, queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries, keys and values as transformers has them: heads before positions in memory order of the other way."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(tokens(row), heads, SIZE, generator=generator, dtype=dtype) for heads in (queries, keys, keys)]
    return [x.requires_grad_() for x in made]


def mask(row: Segments, window: int | None = None) -> Tensor:
    """[S, S]: what each token attends to, written down token by token."""
    window = window or 1000
    segment = [("prompt", p, 0, t) for p, n in enumerate(row.prompts) for t in range(n)]
    segment += [("own", p, r, t) for p, of in enumerate(row.responses) for r, n in enumerate(of) for t in range(n)]
    seen = torch.zeros(len(segment), len(segment), dtype=torch.bool)
    for i, (kind, p, r, t) in enumerate(segment):
        for j, (other, q, s, u) in enumerate(segment):
            same = kind == other and (p, r) == (q, s) and t - window < u <= t
            before = kind == "own" and other == "prompt" and p == q and row.prompts[p] + t - window < u
            seen[i, j] = same or before
    return seen


def dense(q: Tensor, k: Tensor, v: Tensor, row: Segments, window: int | None = None) -> Tensor:
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = torch.einsum("iqd,jqd->qij", q, k) * SCALE
    return torch.einsum("qij,jqd->iqd", scores.masked_fill(~mask(row, window), -torch.inf).softmax(-1), v)


def with_gradients(out: Tensor, of: list[Tensor]) -> list[Tensor]:
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), of)]


WINDOWS = (None, 1, 2, 4, 6, 12, 100)
"""Nothing but the own token, less and more than prompts and responses, and more than all."""


@rows
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(("queries", "keys"), HEADS)
@pytest.mark.parametrize("kernel", [FlashOnCPU, Plain])
def test_output_and_gradients_are_those_of_a_dense_mask(row, queries, keys, kernel, window):
    of = inputs(row, queries, keys)
    found = with_gradients(attend(*of, row, SCALE, kernel, window), of)
    for a, b in zip(found, with_gradients(dense(*of, row, window), of), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
        assert b.abs().max() > 0.1 or window == 1


def test_a_window_that_no_sequence_passes_is_none(monkeypatch):
    monkeypatch.setattr(Segments, "seen_through", None)
    row = ROWS["one group"]
    of = inputs(row, 4, 2)
    assert row.longest == 12 and torch.equal(attend(*of, row, SCALE, window=12), attend(*of, row, SCALE))
    with pytest.raises(TypeError):
        attend(*of, row, SCALE, window=11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_only_the_results_are_rounded(dtype):
    """The two parts are merged in float32."""
    row = ROWS["groups of different sizes"]
    of = inputs(row, 6, 2, dtype)
    found = with_gradients(attend(*of, row, SCALE, Plain), of)
    wide = [x.detach().double().requires_grad_() for x in of]
    for a, b in zip(found, with_gradients(dense(*wide, row), wide), strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_plain_operations_are_not_rounded_by_autocast():
    """Which is on in a forward pass, and off in a backward pass."""
    row = ROWS["groups of different sizes"]
    of = [(3 * x).detach().requires_grad_() for x in inputs(row, 6, 2, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*of, row, SCALE, Plain)
    wide = [x.detach().double().requires_grad_() for x in of]
    for a, b in zip(with_gradients(out, of), with_gradients(dense(*wide, row), wide), strict=True):
        assert float((a.double() - b).abs().max()) < 1e-5 * float(b.abs().max())


def test_large_scores_do_not_overflow():
    row = ROWS["one group"]
    of = [(100 * x).detach().requires_grad_() for x in inputs(row, 4, 2)]
    found = with_gradients(attend(*of, row, SCALE), of)
    for a, b in zip(found, with_gradients(dense(*of, row), of), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", [FlashOnCPU, Plain])
def test_no_tensor_has_a_number_for_each_pair_of_tokens(kernel):
    row = Segments((16,) * 4, ((16,) * 7,) * 4)
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))
            return out

    of = inputs(row, 2, 1)
    with Watch():
        with_gradients(attend(*of, row, SCALE, kernel), of)
    assert tokens(row) == 512 and max(sizes) <= 2 * 512 * 16 < 512 * 512


def test_what_a_row_consists_of():
    row = Segments((3, 2), ((4, 1), (5,)))
    assert row.prompt_tokens == 5
    assert row.own == Pairs((0, 3, 5, 9, 10, 15), (0, 3, 5, 9, 10, 15), causal=True)
    assert row.across == Pairs((0, 5, 10), (0, 3, 5), causal=False)
    assert row.own.longest == (5, 5) and row.across.longest == (5, 3)
    assert Segments((3,), ((),)).across is None
    for wrong in [((3, 2), ((), (5,))), ((3,), ((0,),)), ((3,), ()), ((0,), ((1,),))]:
        with pytest.raises(AssertionError):
            Segments(*wrong)


# On a GPU


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand-ins for torch's two functions that compute what those do, and keep what they were called with."""
    calls: list[dict[str, Any]] = []

    def pairs(q, k, ends_q, ends_k, max_q, max_k, dropout, causal, left=None, right=None) -> Pairs:
        assert ends_q.dtype == ends_k.dtype == torch.int32 and dropout == 0.0
        assert (left, right) == (None, None) or (causal and right == 0)
        window = None if left is None else left + 1
        found = Pairs(tuple(ends_q.tolist()), tuple(ends_k.tolist()), causal, window)
        # They read beyond neither.
        assert found.queries[-1] == len(q) and found.keys[-1] == len(k) and found.longest == (max_q, max_k)
        return found

    def forward(q, k, v, ends_q, ends_k, max_q, max_k, dropout, causal, debug, *, scale, **sides):
        of = pairs(q, k, ends_q, ends_k, max_q, max_k, dropout, causal, *sides.values())
        out, lse, _ = Plain.forward(q, k, v, of, scale)
        calls.append(dict(forward=of, debug=debug))
        return out, lse, torch.tensor([len(calls)]), torch.tensor([0]), torch.empty(0)

    def backward(
        grad, q, k, v, out, lse, ends_q, ends_k, max_q, max_k, dropout, causal, seed, unused, *, scale, **sides
    ):
        of = pairs(q, k, ends_q, ends_k, max_q, max_k, dropout, causal, *sides.values())
        assert grad.is_contiguous() and lse.is_contiguous() and lse.shape == (q.shape[1], len(q))
        calls.append(dict(backward=of, seed=int(seed)))
        return Plain.backward(grad, q, k, v, out, lse, of, scale)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", backward)
    return calls


@rows
def test_two_calls_each_way_on_a_gpu(row, varlen):
    of = inputs(row, 6, 2)
    found = with_gradients(attend(*of, row, SCALE, FlashOnCUDA), of)
    for a, b in zip(found, with_gradients(dense(*of, row), of), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    both = [row.own] if row.across is None else [row.own, row.across]
    # The numbers that a forward pass was drawn with go to its own backward pass.
    expected = [dict(forward=of, debug=False) for of in both]
    assert varlen == expected + [dict(backward=of, seed=i + 1) for i, of in enumerate(both)]


@rows
def test_one_call_each_way_with_a_window(row, varlen):
    of = inputs(row, 6, 2)
    found = with_gradients(attend(*of, row, SCALE, FlashOnCUDA, window=4), of)
    for a, b in zip(found, with_gradients(dense(*of, row, 4), of), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    pairs = row.seen_through(4).pairs
    assert pairs.window == 4 and varlen == [dict(forward=pairs, debug=False), dict(backward=pairs, seed=1)]


def test_torchs_functions_have_the_arguments_that_are_given():
    forward, backward = (
        getattr(torch.ops.aten, f"_flash_attention_{way}").default._schema for way in ("forward", "backward")
    )
    common = ["query", "key", "value"]
    sizes = ["cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal"]
    assert [a.name for a in forward.arguments][:10] == [*common, *sizes, "return_debug_mask"]
    given = ["grad_out", *common, "out", "logsumexp", *sizes, "rng_state", "unused"]
    assert [a.name for a in backward.arguments][:14] == given
    for of in (forward, backward):
        named = [a.name for a in of.arguments if a.kwarg_only]
        assert {"scale", "window_size_left", "window_size_right"} <= set(named)
    assert len(forward.returns) == 5 and len(backward.returns) == 3


@pytest.mark.parametrize(
    ("device", "dtype", "size", "capability", "expected"),
    [
        ("cpu", torch.float32, 64, None, FlashOnCPU),
        ("cpu", torch.bfloat16, 64, None, FlashOnCPU),
        ("cuda", torch.bfloat16, 128, (9, 0), FlashOnCUDA),
        ("cuda", torch.float16, 8, (8, 0), FlashOnCUDA),
        ("cuda", torch.float32, 128, (9, 0), Plain),
        ("cuda", torch.bfloat16, 12, (9, 0), Plain),
        ("cuda", torch.bfloat16, 512, (9, 0), Plain),
        ("cuda", torch.bfloat16, 128, (7, 5), Plain),
        ("mps", torch.bfloat16, 128, None, Plain),
    ],
)
def test_which_kernel(monkeypatch, device, dtype, size, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    q = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(5, 4, size))
    assert choose_kernel(q, 2) is expected  # type: ignore[arg-type]


@pytest.mark.parametrize("works", [True, False])
@pytest.mark.parametrize(("size", "window", "asked"), [(256, None, True), (64, 100, True), (128, None, False)])
def test_what_was_not_tried_on_a_card_is_tried_there(monkeypatch, size, window, asked, works):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    cuda, calls = torch.device("cuda"), []
    monkeypatch.setattr(module, "_refused", lambda *of: calls.append(of) or (None if works else "it is off"))
    q = SimpleNamespace(device=cuda, dtype=torch.bfloat16, shape=(5, 4, size))
    assert choose_kernel(q, 2, window) is (FlashOnCUDA if works or not asked else Plain)  # type: ignore[arg-type]
    assert calls == ([(torch.bfloat16, 4, 2, size, window is not None)] if asked else [])


@pytest.mark.parametrize("windows", [False, True])
def test_a_kernel_that_works_is_found_to(varlen, monkeypatch, windows):
    of = torch.bfloat16, 8, 4, 256, windows
    for kernel in (FlashOnCUDA, FlashOnCPU):
        assert 0 < difference(kernel, torch.device("cpu"), *of) <= CLOSE
    monkeypatch.setattr(module, "CUDA", "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert module._refused.__wrapped__(*of) is None, "what it is compared with is not rounded"


@pytest.mark.parametrize("wrong", ["window", "causal", "refuses", "nothing but NaN"])
def test_a_kernel_that_does_not_work_is_found_out(varlen, monkeypatch, wrong):
    """One that knows no windows, that sees what comes later, that the device has not."""
    right = torch.ops.aten._flash_attention_forward

    def forward(*of, **named):
        if wrong == "refuses":
            raise RuntimeError("FlashAttention backward for head dim > 192 requires A100 or H100")
        if wrong == "window":
            named.pop("window_size_left"), named.pop("window_size_right")
        if wrong == "nothing but NaN":
            return tuple(x * float("nan") if x.is_floating_point() else x for x in right(*of, **named))
        if wrong == "causal":
            return right(*of[:8], False, *of[9:], scale=named["scale"])
        return right(*of, **named)

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", forward)
    monkeypatch.setattr(module, "CUDA", "cpu")
    why = module._refused.__wrapped__(torch.bfloat16, 4, 2, 64, windows=True)
    assert "A100" in why if wrong == "refuses" else "its results are" in why


def test_not_on_amds_cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    of = torch.bfloat16, 4, 2, 64, False
    assert module.why_not_flash(*of) is None
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert module.why_not_flash(*of) == ""
