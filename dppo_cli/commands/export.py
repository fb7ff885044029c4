"""`dppo export`: the adapter for PEFT, or the model with the adapter merged in for plain transformers.

A merge happens in float32 on the unquantised base. What was written is read back and compared with the trained policy.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dppo_cli.commands.schemas import ExportConfig, TrainConfig
from dppo_cli.commands.trained import TrainedRun, open_run
from dppo_cli.config.sections import Hardware
from dppo_cli.errors import RunError
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.telemetry.table import print_table, print_warning
from dppo_cli.training.run_folder import check_disk, check_free

PROBE_PROMPTS = 8
"""Prompts on which the logits of the export and of the trained policy are compared."""

PLAIN_CPU = Hardware("cpu", "float32", tokens_per_micro_batch=8192, head_chunk=256, gradient_checkpointing=False)
"""Where a merge happens: exact, and wherever there is memory for the base."""


def run_export(config: ExportConfig, config_yaml: str) -> dict[str, Any]:
    """Write the export, read it back, compare; returns what was printed."""
    run = open_run(config.run, print_warning)
    trained = run.config
    out = Path(config.out) if config.out else run.folder / f"export-{config.format}"
    if out.exists():
        raise RunError(f"out={out} exists already; name another folder, or delete it first")
    check_free(out, "out")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        if config.format == "adapter":
            check_disk(out, 2 * _size(run.adapter))
            shutil.copytree(run.adapter, temporary)
            written = _policy(trained, temporary, quantised=True).model
        else:
            written = _merge(trained, run.adapter, temporary, config.dtype)
        policy = _policy(trained, run.adapter, quantised=True)
        difference = float((_logits(policy.model, policy, trained) - _logits(written, policy, trained)).abs().max())
        temporary.replace(out)
    except OSError as error:
        raise RunError(f"out={out} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    rows = [
        *_of_the_run(run),
        ("written to", str(out)),
        ("size", f"{_size(out) / 2**20:.1f} MiB"),
        ("base model", policy.path),
        ("largest logit difference to the trained policy", f"{difference:.2g}"),
    ]
    print_table(f"export {config.format}", rows)
    if config.format == "merged" and trained.adapter.quantization is not None:
        print(f"The policy was trained on a {trained.adapter.quantization} base; the merge uses the unquantised one.")
    return {"out": str(out), "bytes": _size(out), "max_logit_difference": difference}


def _of_the_run(run: TrainedRun) -> list[tuple[str, str]]:
    """What the run reached and cost, as far as it is known."""
    if run.summary is None:
        return [("run", str(run.folder)), ("adapter", str(run.adapter))]
    s = run.summary
    after = "not measured" if s["eval_after"] is None else f"{s['eval_after']:.1%}"
    return [
        ("run", str(run.folder)),
        ("accuracy before, after", f"{s['eval_before']:.1%}, {after}"),
        ("training", f"{s['steps']} steps, {s['seconds']:.0f} s, {s['peak_memory_gib']:.2f} GiB"),
    ]


def _policy(trained: TrainConfig, adapter: Path, quantised: bool) -> Policy:
    """The trained policy, or (not quantised) the same adapter on the base as it was published."""
    lora = replace(trained.adapter, quantization=trained.adapter.quantization if quantised else None)
    return load_policy(
        trained.model.path,
        trained.model.revision,
        PLAIN_CPU,
        warn=print_warning,
        new_adapter=lora,
        saved_adapter=adapter,
    )


def _merge(trained: TrainConfig, adapter: Path, out: Path, dtype: str) -> PreTrainedModel:
    """Merge in float32, write in `dtype`, read back."""
    policy = _policy(trained, adapter, quantised=False)
    assert policy.peft is not None
    merged = policy.peft.merge_and_unload().to(getattr(torch, dtype))
    check_disk(out, sum(p.numel() * p.element_size() for p in merged.parameters()))
    merged.save_pretrained(str(out))
    policy.tokenizer.save_pretrained(str(out))
    return AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32)


@torch.no_grad()
def _logits(model: PreTrainedModel, policy: Policy, trained: TrainConfig) -> Tensor:
    """Logits of the last position of the probe prompts, float32 [PROBE_PROMPTS, V]."""
    prompts = policy.encode(trained.data.load().heldout[:PROBE_PROMPTS], trained.prompt)
    rows = [model(input_ids=torch.tensor([p.token_ids])).logits[0, -1].float() for p in prompts]
    return torch.stack(rows)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
