"""Norms, gates and rotations of a model of a known family in one kernel each, in training and in sampling, or not."""

from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from dppo_cli.kernels.layer_parts import NORMS
from dppo_cli.kernels.probe import refused, without_triton

WITHOUT_FUSED = "norms, gates and rotations take several kernels each, because those in one do not work here: {}"


def fuse(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, warn: Callable[[str], None]) -> None:
    """On GPUs in 16 bits; `warn` is told if they should run so and cannot. Deep copies of the model have them, too."""
    if not any(type(module) in NORMS for module in model.modules()):
        return
    why_not = without_triton(device, dtype)
    if why_not is None:
        from dppo_cli.kernels.fused import comparison, layers  # which imports Triton

        why_not = refused(partial(comparison.difference, model, device, dtype), comparison.CLOSE)
        if why_not is None:
            layers.make_fused(model)
    if why_not:
        warn(WITHOUT_FUSED.format(why_not))
