"""Stands in for torch's flash kernel for sequences of different lengths, on devices that do not have it."""

import torch


def plain_flash(q, k, v, q_start, k_start, max_q, max_k, dropout, causal, debug, *, scale, seqused_k):
    """What torch's kernel computes with these arguments, row by row; an empty row's log-sum-exp is infinite."""
    assert (max_q, dropout, causal, debug) == (1, 0.0, False, False)
    assert q_start.dtype == k_start.dtype == seqused_k.dtype == torch.int32
    assert q_start.tolist() == list(range(len(q) + 1)) and max(seqused_k.tolist()) <= max_k
    assert len(k_start) == len(q) + 1 and len(seqused_k) == len(q) and k.is_contiguous() and v.is_contiguous()
    found, lses = [], []
    for row, (start, used) in enumerate(zip(k_start.tolist(), seqused_k.tolist(), strict=False)):
        keys, values = (
            states[start : start + used].repeat_interleave(q.shape[1] // k.shape[1], 1) for states in (k, v)
        )
        scores = torch.einsum("hd,xhd->hx", q[row].float(), keys.float()) * scale
        found.append(torch.einsum("hx,xhd->hd", scores.softmax(-1), values.float()).to(q.dtype))
        lses.append(scores.logsumexp(-1) if used else scores.new_full(q.shape[1:2], float("inf")))
    return torch.stack(found), torch.stack(lses, 1), None
