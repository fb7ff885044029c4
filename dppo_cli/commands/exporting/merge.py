"""The trained policy as one plain model: W + BA in float32, written in any precision."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dppo_cli.commands.exporting.compare import Probe, check_same, logits_of
from dppo_cli.commands.schemas import ExportConfig
from dppo_cli.errors import ModelError
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.copies import base_weight, quantised_layers
from dppo_cli.telemetry.table import print_warning

MERGED, SAME = 1e-3, 1e-5
"""Largest difference of logits, as a share of the largest logit, between W + BA and W, B, A apart in float32; and
between two models of the same weights."""


def load_trained(config: ExportConfig, adapter: Path, original: bool = False) -> Policy:
    """The policy with this adapter, on the base that the run was trained on, or on the original one in float32."""
    return load_policy(
        config.model,
        replace(config.hardware, dtype="float32") if original else config.hardware,
        warn=print_warning,
        adapter=replace(config.adapter, quantization=None) if original else config.adapter,
        saved_adapter=adapter,
    )


def merge(
    config: ExportConfig, trained: Policy, adapter: Path, probes: Sequence[Probe]
) -> tuple[PreTrainedModel, Policy]:
    """The merged model in float32, and the policy that it was made of, which has its tokenizer and device.

    Raises ModelError if the merge has changed more than rounding explains.
    """
    policy = load_trained(config, adapter, original=True)
    if config.base == "dequantized":
        for name, layer in quantised_layers(trained.model).items():
            policy.model.get_parameter(f"{name}.weight").data.copy_(base_weight(layer))
    assert policy.peft is not None
    apart = logits_of(policy.model, policy, probes)
    merged: PreTrainedModel = policy.peft.merge_and_unload()
    check_same(apart, logits_of(merged, policy, probes), MERGED, "the merge is not W + BA")
    return merged, policy


def size_of(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes of its weights in a precision."""
    return sum(p.numel() for p in model.parameters()) * dtype.itemsize


def write_model(
    model: PreTrainedModel, policy: Policy, dtype: torch.dtype, out: Path, shard: str, probes: Sequence[Probe]
) -> list[Tensor]:
    """Write the model with its tokenizer; the logits, in float32, of the weights as they were rounded to `dtype`."""
    _convert(model, dtype)
    model.save_pretrained(str(out), max_shard_size=shard)
    policy.tokenizer.save_pretrained(str(out))
    _convert(model, torch.float32)
    rounded = logits_of(model, policy, probes)
    if not all(logits.isfinite().all() for logits in rounded):
        name = str(dtype).removeprefix("torch.")
        raise ModelError(f"the merged model's logits are not finite in {name}; use another dtype")
    return rounded


def read_model(folder: Path, policy: Policy, probes: Sequence[Probe]) -> list[Tensor]:
    """The logits of what a folder holds."""
    read: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, trust_remote_code=False
    )
    return logits_of(read.to(policy.device), policy, probes)  # type: ignore[arg-type]


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The weights only: what transformers computes from the config stays exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
