"""AdamW with moments in 32 or 8 bits: made from its options, written to checkpoints, and its learning rate."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dppo_cli.config.sections import AdamW
from dppo_cli.errors import ConfigError
from dppo_cli.kernels.devices import MPS


def make_optimizer(parameters: Sequence[nn.Parameter], optim: AdamW, device: torch.device) -> torch.optim.Optimizer:
    """Raises ConfigError for 8 bits on a device that bitsandbytes has no kernels for."""
    b1, b2 = optim.betas
    if optim.bits == 32:
        return torch.optim.AdamW(
            parameters, lr=optim.lr, betas=(b1, b2), eps=optim.eps, weight_decay=optim.weight_decay
        )
    if device.type == MPS:
        raise ConfigError(
            f"optim.bits={optim.bits} needs bitsandbytes, which has no kernels for hardware.device=mps; use optim=adamw"
        )
    import bitsandbytes  # It takes seconds.

    library: Any = bitsandbytes
    # It rounds in blocks of 256 numbers, and leaves parameters of fewer than 4,096 in 32 bits.
    made: torch.optim.Optimizer = library.optim.AdamW8bit(
        parameters, lr=optim.lr, betas=(b1, b2), eps=optim.eps, weight_decay=optim.weight_decay
    )
    return made


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer keeps of a parameter. Not from its `state_dict()`, where bitsandbytes nests it for FSDP."""
    return {key: torch.as_tensor(value) for key, value in optimizer.state.get(parameter, {}).items()}


def restored(value: Tensor) -> Any:
    """A value of `moments_of` as the optimizer had it: bitsandbytes counts its steps in an int, torch in a float32."""
    return int(value) if value.dtype == torch.int64 else value.clone()


def lr_factor(update: int, total_updates: int, optim: AdamW) -> float:
    """What the learning rate is multiplied by at update 0, 1, ...: linear warm-up, then constant, or a cosine.

    The cosine would be 0 at update `total_updates`, one after the last: an update with a rate of 0 would be wasted.
    """
    if update < optim.warmup_updates:
        return (update + 1) / optim.warmup_updates
    if optim.schedule == "constant":
        return 1.0
    progress = (update - optim.warmup_updates) / max(1, total_updates - optim.warmup_updates)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
