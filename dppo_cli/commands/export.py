"""`dppo export`: the adapter for PEFT, or the model with the adapter merged in for plain transformers.

A merge happens in float32 on the unquantised base. What was written is read back and compared with the trained policy.
"""

import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dppo_cli.commands.schemas import DTYPES, FORMATS, ExportConfig
from dppo_cli.commands.trained import CONFIG, TrainedRun, folder_of, open_run, run_config
from dppo_cli.config.checks import check_choice
from dppo_cli.config.saved import read_config
from dppo_cli.config.sections import Hardware
from dppo_cli.errors import ModelError, RunError
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.telemetry.table import percent, print_table, print_warning
from dppo_cli.training.card import card
from dppo_cli.training.run_folder import check_disk, check_free

PROBE_PROMPTS = 8
"""Prompts on which the logits of the export and of the trained policy are compared."""

PLAIN_CPU = Hardware("cpu", "float32", tokens_per_micro_batch=8192, head_chunk=256, gradient_checkpointing=False)
"""Where an export is compared unless the user says otherwise: exact, and wherever there is memory for the base."""

MERGED, SAME = 1e-3, 1e-5
"""Largest difference of logits, as a share of the largest logit, between W + BA and W, B, A apart in float32; and
between two models of the same weights."""


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build: what `node` leaves open is the run's. Raises RunError if the run cannot be used."""
    check_choice("format", node.format, FORMATS)
    check_choice("dtype", node.dtype, DTYPES)
    own = OmegaConf.masked_copy(node, ["data"])
    base = run_config(folder_of(str(node.run)), own, typed, bool(node.trust))
    with open_dict(node):
        for name in ("model", "adapter", "data", "prompt"):
            node[name] = base[name]
        node.hardware = OmegaConf.merge(asdict(PLAIN_CPU), node.hardware or {})
    return node


def run_export(config: ExportConfig, config_yaml: str) -> dict[str, Any]:
    """Write the export, read it back, compare; returns what was printed."""
    run = open_run(config.run, print_warning)
    out = Path(config.out) if config.out else run.folder / f"export-{config.format}"
    try:
        if out.exists():
            raise RunError(f"out={out} exists already; name another folder, or delete it first")
        check_free(out, "out")
        difference = _write(config, run, out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"out={out} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    rows = [
        *_of_the_run(run),
        ("written to", str(out)),
        ("size", f"{_size(out) / 2**20:.1f} MiB"),
        ("base model", config.model.path),
        ("largest logit difference to the trained policy", f"{difference:.2g}"),
    ]
    print_table(f"export {config.format}", rows)
    if config.format == "merged" and config.adapter.quantization is not None:
        print(f"The policy was trained on a {config.adapter.quantization} base; the merge uses the unquantised one.")
    return {"out": str(out), "bytes": _size(out), "max_logit_difference": difference}


def _write(config: ExportConfig, run: TrainedRun, out: Path) -> float:
    """Write beside `out`, check, and rename; the largest difference to the trained policy's logits."""
    parents = [p for p in out.parents if not p.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
            written = Path(folder) / "export"
            if config.format == "adapter":
                check_disk(out, 2 * _size(run.adapter))
                written.mkdir()
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    shutil.copyfile(run.adapter / name, written / name)
                found = _logits(_policy(config, written, quantised=True), config)
            else:
                found = _merge(config, run.adapter, written)
            expected = _logits(_policy(config, run.adapter, quantised=True), config)
            if config.format == "adapter":
                _check_same(expected, found, SAME, "the adapter that was written is not the one that was trained")
            elif not found.isfinite().all():
                raise ModelError(f"the merged model's logits are not finite in {config.dtype}; use another dtype")
            plain: Any = OmegaConf.to_container(read_config(run.folder / CONFIG, trust=True)[0])
            (written / "README.md").write_text(card(plain, run.summary, config.format), encoding="utf-8")
            written.replace(out)
    except BaseException:
        for parent in parents:
            parent.rmdir()
        raise
    return float((expected - found).abs().max())


def _of_the_run(run: TrainedRun) -> list[tuple[str, str]]:
    """What the run reached and cost, as far as it is known."""
    if run.summary is None:
        return [("run", str(run.folder)), ("adapter", str(run.adapter))]
    s = run.summary
    return [
        ("run", str(run.folder)),
        ("accuracy before, after", f"{percent(s['eval_before'])}, {percent(s['eval_after'])}"),
        ("training", f"{s['steps']} steps, {s['seconds']:.0f} s, {s['peak_memory_gib']:.2f} GiB"),
    ]


def _policy(config: ExportConfig, adapter: Path, quantised: bool) -> Policy:
    """The trained policy, or (not quantised) the same adapter on the base as it was published."""
    return load_policy(
        config.model.path,
        config.model.revision,
        config.hardware,
        warn=print_warning,
        adapter=config.adapter if quantised else replace(config.adapter, quantization=None),
        saved_adapter=adapter,
    )


def _merge(config: ExportConfig, adapter: Path, out: Path) -> Tensor:
    """Merge in float32, write in `config.dtype`, read back; the logits of what was read.

    Raises ModelError if the merge has changed more than rounding explains, or if something else was read than written.
    """
    policy = _policy(replace(config, hardware=replace(config.hardware, dtype="float32")), adapter, quantised=False)
    assert policy.peft is not None
    apart = _logits(policy, config)
    merged = policy.peft.merge_and_unload()
    _check_same(apart, _logits(policy, config, merged), MERGED, "the merge is not W + BA")
    _convert(merged, getattr(torch, config.dtype))
    check_disk(out, sum(p.numel() * p.element_size() for p in merged.parameters()))
    merged.save_pretrained(str(out))
    policy.tokenizer.save_pretrained(str(out))
    _convert(merged, torch.float32)
    rounded = _logits(policy, config, merged)
    read: Any = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32, trust_remote_code=False)
    found = _logits(policy, config, read.to(policy.device))
    if rounded.isfinite().all():
        _check_same(rounded, found, SAME, "what was read back is not what was written")
    return found


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The weights only: what transformers computes from the config stays exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def _logits(policy: Policy, config: ExportConfig, model: PreTrainedModel | None = None) -> Tensor:
    """Logits of the last position of the probe prompts, float32 [PROBE_PROMPTS, V]; of `model`, or the policy's."""
    prompts = policy.encode(config.data.load().heldout[:PROBE_PROMPTS], config.prompt)
    with policy.autocast():
        rows = [
            (model or policy.model)(input_ids=torch.tensor([p.token_ids], device=policy.device)).logits[0, -1]
            for p in prompts
        ]
    return torch.stack(rows).float().cpu()


def _check_same(expected: Tensor, found: Tensor, share: float, problem: str) -> None:
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    if not difference <= share * max(1.0, largest):  # so that NaN is a difference, too
        raise ModelError(
            f"{problem}: logits differ by {difference:.2g} (largest logit {largest:.2g}); nothing was written"
        )


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
