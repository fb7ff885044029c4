"""What the in-process engine samples with: `rollout.weights` and `rollout.dtype`, decided for a policy.

merged       W + BA as one weight: the fewest operations a token. Exact in float32. In 16 bits the sum is rounded to
             W's precision, which swallows small updates: the sampler would be another policy than the one trained.
adapter      W with the adapter beside it: the trainer's own weights, or a copy of W in another precision.
dequantized  For a quantised base: a copy of W as the trainer's products see it, with the adapter beside it.
quantized    For a quantised base: the trainer's own weights. The least memory. For another base: a copy of W rounded to
             4 bits, another policy than the one trained, as with a server that samples from quantised weights.
"""

from dataclasses import dataclass

import psutil
import torch

from dppo_cli.errors import ConfigError
from dppo_cli.policy.policy import Policy

KINDS = ("auto", "merged", "adapter", "dequantized", "quantized")
SHARE = 0.5
"""Of the free memory: what `auto` takes at most for a copy of a quantised base."""


@dataclass(frozen=True)
class SamplingWeights:
    """`copied`: they are a copy, in `dtype`; else the policy itself samples. `why`: what decided, for the user."""

    kind: str
    dtype: torch.dtype
    copied: bool
    why: str

    def __str__(self) -> str:
        what = {
            "merged": "weights with the adapter merged in",
            "adapter": "weights with the adapter beside them",
            "dequantized": "dequantised weights with the adapter beside them",
            "quantized": "4-bit weights with the adapter beside them",
        }[self.kind]
        return f"{what}, {str(self.dtype).removeprefix('torch.')}{f' ({self.why})' if self.why else ''}"


def check_weights(kind: str, dtype: str | None, quantised: bool) -> None:
    """Raise ConfigError for a combination that cannot work."""
    if kind == "dequantized" and not quantised:
        raise ConfigError(f"rollout.weights={kind} needs a quantised base (adapter=qlora); use rollout.weights=auto")
    if kind == "adapter" and quantised:
        raise ConfigError(
            "rollout.weights=adapter is for bases that are not quantised; use dequantized (faster) or quantized (less "
            "memory)"
        )
    if kind == "quantized" and dtype is not None:
        if not quantised:
            raise ConfigError(f"rollout.dtype={dtype}: a 4-bit copy computes in the precision of training; use null")
        raise ConfigError(f"rollout.dtype={dtype} needs a copy of the weights; use rollout.weights=dequantized")


def decide(kind: str, dtype: str | None, policy: Policy) -> SamplingWeights:
    """What a policy is sampled with. Raises ConfigError for what it cannot be sampled with."""
    quantised = bool(getattr(policy.model, "is_quantized", False))
    check_weights(kind, dtype, quantised)
    precision = policy.dtype if dtype is None else getattr(torch, dtype)
    if policy.peft is None:
        return SamplingWeights("adapter", precision, precision != policy.dtype, "there is none")
    if kind != "auto":
        own = kind == "adapter" or (kind == "quantized" and quantised)
        copied = not own or precision != policy.dtype
        return SamplingWeights(kind, precision, copied, "")
    exact = precision == torch.float32
    if not quantised:
        if exact:
            return SamplingWeights("merged", precision, True, "auto: exact in float32")
        return SamplingWeights("adapter", precision, precision != policy.dtype, "auto: a merge in 16 bits is not exact")
    needed, free = _copy_bytes(policy, precision), _free_bytes(policy.device)
    room = f"{needed / 2**30:.1f} GiB of {free / 2**30:.1f} GiB free"
    if dtype is None and needed > SHARE * free:
        return SamplingWeights("quantized", precision, False, f"auto: a copy would take {room}")
    return SamplingWeights("merged" if exact else "dequantized", precision, True, f"auto: a copy takes {room}")


def _copy_bytes(policy: Policy, dtype: torch.dtype) -> int:
    """Of the weights that a copy would hold."""
    quantised = (p for p in policy.model.parameters() if hasattr(p, "quant_state"))
    # Two numbers a byte.
    return sum(2 * p.numel() for p in quantised) * dtype.itemsize


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
