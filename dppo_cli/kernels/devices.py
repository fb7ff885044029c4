"""What differs between devices: settings of CUDA, random states, memory. MPS, Apple's GPU, was written without one."""

import torch
from torch import Tensor

CUDA, MPS = "cuda", "mps"


def set_up(device: torch.device) -> None:
    """Settings of the whole process that sampling and training rely on, before the first kernel runs."""
    if device.type != CUDA:
        return
    # torch 2.11 prefers cuDNN's attention on an H100. It makes a plan for each pair of rows and key length, and
    # sampling has a new pair at every token: tens of milliseconds of a step. The other kernels need no plan.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Partial sums of a product would be rounded to bfloat16 where it is split, which depends on the number of rows:
    # sampler and trainer have different ones.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def random_state(device: torch.device) -> Tensor | None:
    """Of the device's own generator, uint8 on the CPU; None on a CPU, which has torch's alone."""
    if device.type == CUDA:
        return torch.cuda.get_rng_state(device)
    return torch.mps.get_rng_state() if device.type == MPS else None


def set_random_state(device: torch.device, state: Tensor | None) -> None:
    """Go on from what `random_state` gave."""
    if state is not None and device.type == CUDA:
        torch.cuda.set_rng_state(state, device)
    elif state is not None and device.type == MPS:
        torch.mps.set_rng_state(state)


def float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, which MPS lacks: from there on the CPU."""
    return (tensor.cpu() if tensor.device.type == MPS else tensor).double()


def empty_cache(device: torch.device) -> None:
    """Return what torch's allocator holds free to the device."""
    if device.type == CUDA:
        torch.cuda.empty_cache()
    elif device.type == MPS:
        torch.mps.empty_cache()


def peak_bytes(device: torch.device) -> int | None:
    """The most memory held so far; None on a CPU, where the system counts.

    MPS counts no peak. What its driver has allocated is near it, because torch's allocator keeps what it was given.
    """
    if device.type == CUDA:
        return torch.cuda.max_memory_allocated(device)
    return torch.mps.driver_allocated_memory() if device.type == MPS else None
