"""What tests of LoRA beside the weights share: layers of a tiny model, and inputs of them."""

import torch
from torch import nn

SIBLINGS = ("q_proj", "k_proj", "v_proj")


def layers(policy, names=SIBLINGS) -> list[nn.Module]:
    attention = policy.model.model.layers[0].self_attn
    return [getattr(attention, name) for name in names]


def inputs(policy, rows: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, policy.model.config.hidden_size, generator=generator).to(dtype)
