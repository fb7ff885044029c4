"""Graphics cards: memory, and what their data sheets promise. All figures are dense, without sparsity.

Sources, NVIDIA: data sheets of the H200, H100, A100, L40S, L4 and A10; "Ada GPU architecture" v2 (RTX 4090, 4080) and
"Ampere GA102 GPU architecture" v2 (RTX 3090), there for sums in float32. Of memory, what the driver leaves to programs.
"""

import re
from dataclasses import dataclass

from dppo_cli.config.checks import check_choice


@dataclass(frozen=True)
class Card:
    """`memory_gib`: what a program sees of it. TFLOP/s of products; `bytes_per_second` of its memory.

    `decoded_for`: rows for which a product with 4-bit weights decodes a weight once, as `fused.nf4.choose` has it.
    """

    name: str
    memory_gib: float
    bfloat16: float
    float32: float
    bytes_per_second: float
    decoded_for: int = 64


HOPPER = 128
"""`decoded_for` of cards with tensor cores like an H100's."""
CARDS = {
    "h200": Card("NVIDIA H200 SXM 141 GB", 139.8, 989.0, 67.0, 4.8e12, HOPPER),
    "h100": Card("NVIDIA H100 SXM 80 GB", 79.2, 989.0, 67.0, 3.35e12, HOPPER),
    "h100_pcie": Card("NVIDIA H100 PCIe 80 GB", 79.2, 756.0, 51.0, 2.0e12, HOPPER),
    "a100_80gb": Card("NVIDIA A100 SXM 80 GB", 79.2, 312.0, 19.5, 2.039e12),
    "a100_40gb": Card("NVIDIA A100 SXM 40 GB", 39.4, 312.0, 19.5, 1.555e12),
    "l40s": Card("NVIDIA L40S 48 GB", 44.5, 362.0, 91.6, 0.864e12),
    "rtx4090": Card("NVIDIA GeForce RTX 4090 24 GB", 23.5, 165.2, 82.6, 1.008e12),
    "rtx3090": Card("NVIDIA GeForce RTX 3090 24 GB", 23.6, 71.0, 35.6, 0.936e12),
    "rtx4080": Card("NVIDIA GeForce RTX 4080 16 GB", 15.6, 97.5, 48.7, 0.717e12),
    "a10": Card("NVIDIA A10 24 GB", 22.1, 125.0, 31.2, 0.6e12),
    "l4": Card("NVIDIA L4 24 GB", 22.0, 121.0, 30.3, 0.3e12),
}
OF_A_SIZE = {16: "rtx4080", 24: "l4", 40: "a100_40gb", 48: "l40s", 80: "a100_80gb", 141: "h200"}
"""The card that a number of GB stands for: of the table the one with the slowest memory."""


def check_card(name: str | None) -> None:
    """Raise ConfigError for a card that is not in the table."""
    check_choice("card", name, (None, *CARDS))


def card_of(hardware: str) -> str | None:
    """The card that the name of a hardware option stands for, such as gpu_24gb; None if it names no size."""
    found = re.search(r"(\d+)gb", hardware)
    return OF_A_SIZE.get(int(found[1])) if found else None
