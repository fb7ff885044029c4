"""What a plan is for: this machine or a card, its memory, and how fast it is."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from dppo_cli.commands.planning.cards import CARDS, HOPPER, Card
from dppo_cli.config.sections import Hardware
from dppo_cli.errors import ConfigError
from dppo_cli.kernels.devices import CUDA, MPS
from dppo_cli.kernels.probe import without_triton
from dppo_cli.kernels.products import multiply

GIB = 2**30
OF_THE_PEAK = 0.45
"""Share of a data sheet's FLOP/s that a training step reaches; 0.4 to 0.5 is usual."""
OF_THE_BANDWIDTH = 0.7
LAUNCH = 1e-5
"""Seconds an operation takes the host of a GPU that is not here: Python and the launch of a kernel. Beside an H100 it
was 10 microseconds in sampling steps without graphs, 41 ms for 4,126 operations, views among them."""
GPU_RUNTIME = 0.6 * GIB
"""Of a GPU: the CUDA context and libraries, which no run's number includes."""
CGROUP = Path("/sys/fs/cgroup/memory.max")
ROWS, SIZE, COPIED = 256, 1024, 64 * 2**20


@dataclass(frozen=True)
class Speed:
    """FLOP/s of products, bytes/s of memory and seconds an operation takes at least. `source`: where they are from.

    `float32`: FLOP/s of products in float32, which no tensor cores compute.
    """

    flops: float
    bytes_per_second: float
    seconds_per_operation: float
    source: str
    float32: float


@dataclass(frozen=True)
class Machine:
    """`free`: bytes that a run can use. `here`: it is this machine.

    `decoded_for`: as in `Card`; 0 where no kernel multiplies with 4-bit weights.
    """

    name: str
    device: str  # cpu or cuda
    dtype: torch.dtype
    total: float
    free: float
    here: bool
    speed: Callable[[], Speed]
    decoded_for: int

    @property
    def on_cpu(self) -> bool:
        return self.device == "cpu"


def find_machine(hardware: Hardware, card: str | None) -> Machine:
    """Raises ConfigError if it is not known what to plan for."""
    has_gpu = torch.cuda.is_available()
    if hardware.device == MPS and card is None:
        raise ConfigError(
            f"hardware.device={MPS} cannot be planned: its memory is shared with the system; plan for hardware=cpu"
        )
    if card is not None and hardware.device == "cpu":
        raise ConfigError(f"card={card} is a GPU, but hardware.device=cpu; leave card out, or use hardware=auto")
    if card is None and hardware.device == "cuda" and not has_gpu:
        raise ConfigError(
            "hardware.device=cuda, but torch sees no GPU here; name the card to plan for, card=l4 for example. "
            f"Choices: {', '.join(CARDS)}"
        )
    if card is not None:
        return _of_card(CARDS[card], _dtype(hardware, torch.bfloat16))
    if has_gpu and hardware.device != "cpu":
        about, free = torch.cuda.get_device_properties(0), float(torch.cuda.mem_get_info(0)[0])
        return _here(about.name, "cuda", _dtype(hardware, torch.bfloat16), about.total_memory, free)
    return _here("this machine's CPU", "cpu", _dtype(hardware, torch.float32), _host_memory(), _free_host_memory())


def _here(name: str, device: str, dtype: torch.dtype, total: float, free: float) -> Machine:
    decoded_for = 0
    if without_triton(torch.device(device), dtype) is None:
        decoded_for = HOPPER if torch.cuda.get_device_capability()[0] == 9 else 64
    return Machine(name, device, dtype, total, free, True, lambda: calibrate(torch.device(device), dtype), decoded_for)


def _of_card(card: Card, dtype: torch.dtype) -> Machine:
    tera = card.float32 if dtype == torch.float32 else card.bfloat16
    speed = Speed(
        tera * 1e12 * OF_THE_PEAK,
        card.bytes_per_second * OF_THE_BANDWIDTH,
        LAUNCH,
        f"data sheet: {OF_THE_PEAK:.0%} of {tera:g} TFLOP/s, {OF_THE_BANDWIDTH:.0%} of "
        f"{card.bytes_per_second / 1e12:g} TB/s",
        card.float32 * 1e12 * OF_THE_PEAK,
    )
    memory = card.memory_gib * GIB
    decoded_for = card.decoded_for if dtype.itemsize == 2 else 0
    return Machine(card.name, "cuda", dtype, memory, memory, False, lambda: speed, decoded_for)


def _dtype(hardware: Hardware, usual: torch.dtype) -> torch.dtype:
    found: torch.dtype = usual if hardware.dtype == "auto" else getattr(torch, hardware.dtype)
    return found


def _host_memory() -> float:
    total = float(psutil.virtual_memory().total)
    return min(total, _limit())


def _free_host_memory() -> float:
    """What this process uses is free once it has ended."""
    own = float(psutil.Process().memory_info().rss)
    return min(float(psutil.virtual_memory().available) + own, _limit())


def _limit() -> float:
    """What a container may use."""
    try:
        text = CGROUP.read_text(encoding="utf-8").strip()
    except OSError:
        text = ""
    return float(text) if text.isdigit() else float("inf")


def calibrate(device: torch.device, dtype: torch.dtype) -> Speed:
    """A few products, copies and small operations, half a second in all."""
    copied, small = torch.ones(COPIED // 4, device=device), torch.ones(64, device=device)

    def flops(of: torch.dtype) -> float:
        x, weight = torch.ones(ROWS, SIZE, device=device, dtype=of), torch.ones(SIZE, SIZE, device=device, dtype=of)
        return 2 * ROWS * SIZE * SIZE / _fastest(lambda: multiply(x, weight), device)

    with torch.inference_mode():
        products = flops(dtype)
        in_float32 = products if dtype == torch.float32 else flops(torch.float32)
        copy = _fastest(lambda: copied.clone(), device)
        operation = _fastest(lambda: [small + small for _ in range(100)], device) / 100
    return Speed(products, 2 * COPIED / copy, operation, "measured here", in_float32)


def _fastest(work: Callable[[], object], device: torch.device, seconds: float = 0.15) -> float:
    """Seconds that it takes undisturbed: the least of several tries, of one at least."""
    work()
    least, end = float("inf"), time.perf_counter() + seconds
    while least == float("inf") or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        if device.type == CUDA:
            torch.cuda.synchronize(device)
        least = min(least, time.perf_counter() - start)
    return least
