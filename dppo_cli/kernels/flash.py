"""Attention of one token per row to two stretches of keys, its prompt's and its own, by FlashAttention-2.

torch's kernel for sequences of different lengths takes the length in use beside the offset of each (`seqused_k`), so
stretches of a pool are sequences to it: of any length, in any order, and several rows may read the same one. It reads a
key once for all of its query heads, and splits long sequences between processors. `scaled_dot_product_attention` needs
a mask for different lengths; with one it takes another kernel, which reads all positions that the mask covers.

Each stretch is an attention of its own, with output o and log-sum-exp l of its scores; together they are, exactly,
    o = o_1 + s (o_2 - o_1),  s = exp(l_2) / (exp(l_1) + exp(l_2)).

Shapes: R rows, M positions of the pool, K key heads, Q query heads per key head, D head size.
"""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dppo_cli.kernels.devices import CUDA

CLOSE = 0.02
"""Largest difference from float32 in 16 bits, for values of unit variance: two roundings of the result."""
ROWS, LONGEST = 5, 512
"""Rows, and positions of a stretch, in which `difference` tries an attention."""


class OverSlots(Protocol):
    """An attention of one token per row to two stretches of pools."""

    def look(self, prompt_R: Tensor, own_R: Tensor, prompt_used_R: Tensor, own_used_R: Tensor) -> None:
        """Where the stretches of each row begin in the pool, and how many positions the next calls attend to: int64.

        A prompt's may be empty, as behind a window; none of a row's own is.
        """
        ...

    def __call__(
        self, q_RKQD: Tensor, keys_MKD: Tensor, values_MKD: Tensor, attn_mask: Tensor | None, scale: float
    ) -> Tensor: ...


class FlashOverSlots:
    """Takes the place of `scaled_dot_product_attention` in `TokenStep`, for keys and values that are whole pools.

    `rows`: at most; `longest`: positions of a stretch, at most.
    """

    def __init__(self, rows: int, longest: int, device: torch.device) -> None:
        self.longest = longest
        self.q_start = torch.arange(2 * rows + 1, dtype=torch.int32, device=device)
        self.k_start = self.used = self.empty = self.q_start[:0]

    def look(self, prompt_R: Tensor, own_R: Tensor, prompt_used_R: Tensor, own_used_R: Tensor) -> None:
        # One call for both: as many sequences as there are rows, twice, and the end of the last, which is not read.
        self.k_start = torch.cat([prompt_R, own_R, own_R[:1]]).int()
        self.used = torch.cat([prompt_used_R, own_used_R]).int()
        self.empty = self.used == 0

    def __call__(
        self, q_RKQD: Tensor, keys_MKD: Tensor, values_MKD: Tensor, attn_mask: Tensor | None, scale: float
    ) -> Tensor:
        """[R, K, Q, D]. `attn_mask` is not read: it says what `look` was told."""
        size = q_RKQD.shape[-1]
        found, lse = torch.ops.aten._flash_attention_forward(
            q_RKQD.expand(2, *q_RKQD.shape).reshape(len(self.used), -1, size),
            keys_MKD,
            values_MKD,
            self.q_start[: len(self.k_start)],
            self.k_start,
            1,
            self.longest,
            0.0,
            False,
            False,
            scale=scale,
            seqused_k=self.used,
        )[:2]
        # The kernel says of an empty stretch that its log-sum-exp is infinite.
        lse = lse.masked_fill(self.empty, -torch.inf)
        return merged(found, lse).reshape(q_RKQD.shape)


def merged(found: Tensor, lse: Tensor) -> Tensor:
    """[R, K Q, D] from the outputs [2 R, K Q, D] and log-sum-exps [K Q, 2 R], first those of all first stretches."""
    (first, second), (first_lse, second_lse) = found.chunk(2), lse.t().chunk(2)
    share = torch.sigmoid(second_lse - first_lse)[..., None]
    return torch.lerp(first.to(share.dtype), second.to(share.dtype), share).to(found.dtype)


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there may be such a kernel; `difference` says whether it does what it has to."""
    return device.type == CUDA and dtype.itemsize == 2 and torch.version.hip is None


@torch.no_grad()
def difference(
    attention: OverSlots, device: torch.device, dtype: torch.dtype, key_heads: int, query_heads: int, size: int
) -> float:
    """The largest difference from attention in float32, for `query_heads` to each key head.

    `attention` is for `ROWS` and `LONGEST`. Three prompts are in use up to their first position, a middle one, and
    their last, and so are the slots of five rows that read them, in no order and some of them twice. Behind these
    positions are large numbers. Two rows have a window: one sees nothing of its prompt, one not its beginning. Raises
    RuntimeError where the kernel refuses.
    """
    longest = LONGEST
    prompt_used, prompt, own_used = (1, 300, longest), (2, 0, 2, 1, 0), (1, longest, 300, longest, 1)
    past, own_past = (0, 1, 0, 37, 0), (0, 13, 0, 0, 0)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q = random(len(prompt), key_heads, query_heads, size)
    keys, values = (random(len(prompt_used) + len(prompt), longest, key_heads, size) for _ in range(2))
    used = torch.tensor(prompt_used + own_used, device=device)
    seen = torch.arange(longest, device=device) < used[:, None]
    for states in (keys, values):
        states[~seen] = 100.0
    prompt_R = torch.tensor(prompt, device=device)
    own_R = torch.arange(len(prompt), device=device) + len(prompt_used)
    past_R, own_past_R = torch.tensor(past, device=device), torch.tensor(own_past, device=device)
    begin = prompt_R * longest + past_R, own_R * longest + own_past_R
    attention.look(*begin, used[prompt_R] - past_R, used[own_R] - own_past_R)
    found = attention(q, keys.flatten(0, 1), values.flatten(0, 1), attn_mask=None, scale=size**-0.5)
    both_keys, both_values, mask = (torch.cat([of[prompt_R], of[own_R]], dim=1) for of in (keys, values, seen))
    position = torch.arange(longest, device=device)
    mask &= torch.cat([position >= past_R[:, None], position >= own_past_R[:, None]], dim=1)
    expected = scaled_dot_product_attention(
        q.float(),
        both_keys.transpose(1, 2).float(),
        both_values.transpose(1, 2).float(),
        attn_mask=mask[:, None, None],
        scale=size**-0.5,
    )
    return float((found.float() - expected).abs().max())
