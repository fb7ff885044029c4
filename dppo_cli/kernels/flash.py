"""Attention of one token per slot by FlashAttention-2, which reads a slot up to its sequence's length and no further.

torch's kernel for sequences of different lengths takes the length in use beside the offset of each (`seqused_k`), so
slots of a fixed size are sequences to it, with free room between them. It reads a key once for all of its query heads,
and splits long sequences between processors. `scaled_dot_product_attention` needs a mask for different lengths; with
one it takes another kernel, which reads all positions that the mask covers.

Shapes: R rows, C positions of a slot, K key heads, Q query heads per key head, D head size.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dppo_cli.kernels.devices import CUDA

CLOSE = 0.02
"""Largest difference of two kernels in 16 bits, for values of unit variance: a few roundings of the result."""


class FlashOverSlots:
    """Takes the place of `scaled_dot_product_attention` in `LlamaStep`, for keys and values that are whole slots."""

    def __init__(self, slots: int, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        self.q_start_S1 = torch.arange(slots + 1, dtype=torch.int32, device=device)
        self.k_start_S1 = self.q_start_S1 * capacity
        self.used_R = self.q_start_S1[:0]

    def look(self, used_R: Tensor) -> None:
        """How many positions of each slot the next calls attend to."""
        self.used_R = used_R.int()

    def __call__(
        self, q_RKQD: Tensor, keys_RKCD: Tensor, values_RKCD: Tensor, attn_mask: Tensor | None, scale: float
    ) -> Tensor:
        """[R, K, Q, D]. `attn_mask` is not read: it says what `look` was told."""
        rows, size = len(q_RKQD), q_RKQD.shape[-1]
        keys, values = (
            states.transpose(1, 2).reshape(-1, states.shape[1], size) for states in (keys_RKCD, values_RKCD)
        )
        found: Tensor = torch.ops.aten._flash_attention_forward(
            q_RKQD.reshape(rows, -1, size),
            keys,
            values,
            self.q_start_S1[: rows + 1],
            self.k_start_S1[: rows + 1],
            1,
            self.capacity,
            0.0,
            False,
            False,
            scale=scale,
            seqused_k=self.used_R,
        )[0]
        return found.reshape(q_RKQD.shape)


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there may be such a kernel; `difference` says whether it does what it has to."""
    return device.type == CUDA and dtype.itemsize == 2 and torch.version.hip is None


@torch.no_grad()
def difference(device: torch.device, dtype: torch.dtype, key_heads: int, query_heads: int, size: int) -> float:
    """The largest difference between the two kernels, for `query_heads` to each key head and three slots.

    They are in use up to their first position, a middle one, and their last; behind these are large numbers. Raises
    RuntimeError where the kernel refuses.
    """
    used, capacity = (1, 300, 512), 512
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    q = random(len(used), key_heads, query_heads, size)
    keys, values = (random(len(used), capacity, key_heads, size) for _ in range(2))
    seen = torch.arange(capacity) < torch.tensor(used)[:, None]
    for states in (keys, values):
        states[~seen.to(device)] = 100.0
    flash = FlashOverSlots(len(used), capacity, device)
    flash.look(torch.tensor(used, device=device))
    given = (q, keys.transpose(1, 2), values.transpose(1, 2))
    found = flash(*given, attn_mask=None, scale=size**-0.5)
    mask = seen[:, None, None].to(device)
    expected = scaled_dot_product_attention(*given, attn_mask=mask, scale=size**-0.5)
    return float((found.float() - expected.float()).abs().max())
