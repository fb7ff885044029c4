"""`dppo export`: the adapter for PEFT, the model with the adapter merged in for plain transformers, or a GGUF file.

A merge happens in float32. What was written is read back and compared with the trained policy, on responses that the
policy samples to held-out prompts. After that it may be pushed to the hub.
"""

import os
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

from dppo_cli.commands.exporting.compare import Probe, accuracy, check_same, logits_of, make_probes
from dppo_cli.commands.exporting.gguf import (
    OUTTYPES,
    check_converts,
    check_tokenizer,
    convert,
    find_converter,
    round_to_q8_0,
)
from dppo_cli.commands.exporting.merge import SAME, load_trained, merge, read_model, size_of, write_model
from dppo_cli.commands.exporting.modelfile import modelfile
from dppo_cli.commands.exporting.publish import check_hub, publish
from dppo_cli.commands.schemas_of_trained import BASES, DTYPES, FORMATS, QUANTISATIONS, ExportConfig
from dppo_cli.commands.trained import CONFIG, TrainedRun, find_trained, folder_of, run_config
from dppo_cli.config.checks import check_choice
from dppo_cli.config.conf_tree import config_dir
from dppo_cli.config.saved import read_config
from dppo_cli.config.sections import Hardware, Model
from dppo_cli.errors import ModelError, RunError
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.telemetry.phases import phase
from dppo_cli.telemetry.table import percent, print_table, print_warning
from dppo_cli.training.agreement import Agreement, agreement
from dppo_cli.training.card import card
from dppo_cli.training.run_folder import check_disk, check_free

PLAIN_CPU = Hardware(
    "cpu", "float32", tokens_per_micro_batch=8192, head_chunk=256, gradient_checkpointing=False, processes=1
)
"""Where an export is compared unless the user says otherwise: exact, and wherever there is memory for the base."""

OF_THE_RUN = ("model", "adapter", "data", "reward", "environment", "prompt", "sampling", "eval", "seed")


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build: what `node` leaves open is the run's. Raises RunError if the run cannot be used."""
    check_choice("format", node.format, FORMATS)
    check_choice("dtype", node.dtype, (*DTYPES, *QUANTISATIONS))
    check_choice("base", node.base, BASES)
    own = OmegaConf.masked_copy(node, ["data", "reward", "environment"])
    base = run_config(folder_of(str(node.run)), own, bool(node.trust))
    # Unresolved, so that values of the environment stay where they are.
    given: Any = OmegaConf.to_container(base)
    sampled = {key: value for key, value in node.sampling.items() if value is not None}
    with open_dict(node):
        for name in OF_THE_RUN:
            node[name] = given[name]
        # An export has no server that has it, and neither has this machine's copy of the policy.
        node.rollout = OmegaConf.load(config_dir() / "rollout/local.yaml")
        node.sampling = {**given["sampling"], "temperature": given["eval"]["temperature"], **sampled}
        node.hardware = OmegaConf.merge(asdict(PLAIN_CPU), node.hardware or {})
    return node


def run_export(config: ExportConfig, config_yaml: str) -> dict[str, Any]:
    """Write the export, read it back, compare; push it if asked to; returns what was printed."""
    run = find_trained(config.run, print_warning, config.checkpoint)
    out = Path(config.out) if config.out else run.folder / f"export-{config.format}"
    converter = find_converter(config.converter) if config.format == "gguf" else None
    if config.push_to_hub is not None:
        check_hub(config.push_to_hub)
    try:
        check_free(out, "out")
        if os.path.lexists(out):
            raise RunError(f"out={out} exists already; name another folder, or delete it first")
        found = _write(config, run, out, converter)
    except (OSError, SafetensorError) as error:
        raise RunError(f"out={out} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    summary: dict[str, Any] = {"out": str(out), "bytes": _size(out), **asdict(found)}
    rows = [
        *_of_the_run(run),
        ("written to", str(out)),
        ("size", f"{_size(out) / 2**20:.1f} MiB"),
        ("base model", "/".join(filter(None, (config.model.path, config.model.gguf_file)))),
        ("compared with the trained policy", f"{found.tokens} tokens of responses to held-out prompts"),
        ("mean KL, TV", f"{found.kl:.2g} nats, {found.tv:.2g} a token"),
        ("same likeliest token", f"{found.greedy:.1%}"),
        ("largest logit difference", f"{found.logit:.2g}"),
    ]
    if config.check == "accuracy":
        with phase("measuring the accuracy of the trained policy"):
            trained = accuracy(load_trained(config, run.adapter), config)
        with phase("measuring the accuracy of the export"):
            exported = accuracy(_exported(config, out), config)
        for name, result in (("trained", trained), ("exported", exported)):
            summary |= {f"accuracy_{name}": result.accuracy, f"accuracy_{name}_error": result.standard_error()}
            rows.append((f"accuracy, {name}", f"{percent(result.accuracy)} ± {percent(result.standard_error())}"))
    print_table(f"export {config.format}", rows)
    if config.format != "adapter" and config.adapter.quantization is not None and config.base == "original":
        print(
            f"The policy was trained on a {config.adapter.quantization} base, and this merge uses the unquantised one: "
            "another policy, by what is shown above. base=dequantized keeps the trained one."
        )
    if config.push_to_hub is not None:
        summary["pushed_to"] = publish(out, config.push_to_hub, config.push_private)
        print(f"pushed to {summary['pushed_to']}")
    return summary


def _write(config: ExportConfig, run: TrainedRun, out: Path, converter: Path | None) -> Agreement:
    """Write beside `out`, check, and rename; how far what was written is from the trained policy."""
    parents = [p for p in out.parents if not p.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
            written = Path(folder) / "export"
            with phase("loading the trained policy"):
                trained = load_trained(config, run.adapter)
            if converter is not None:
                with phase(f"trying {converter.name} on the vocabulary"):
                    check_converts(trained, converter)
            with phase("sampling the responses to compare on"):
                probes = make_probes(trained, config)
                expected = logits_of(trained.model, trained, probes)
            if config.format == "adapter":
                check_disk(out, 2 * _size(run.adapter))
                written.mkdir()
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    shutil.copyfile(run.adapter / name, written / name)
                with phase("loading what was written, and comparing"):
                    policy = load_trained(config, written)
                    found = logits_of(policy.model, policy, probes)
                check_same(expected, found, SAME, "the adapter that was written is not the one that was trained")
            else:
                found = _write_merged(config, trained, run.adapter, written, converter, probes)
            plain: Any = OmegaConf.to_container(read_config(run.folder / CONFIG, trust=True)[0])
            (written / "README.md").write_text(card(plain, run.summary, config.format), encoding="utf-8")
            written.replace(out)
    except BaseException:
        for parent in parents:
            parent.rmdir()
        raise
    return agreement(expected, found)


def _write_merged(
    config: ExportConfig, trained: Policy, adapter: Path, out: Path, converter: Path | None, probes: Sequence[Probe]
) -> list[Tensor]:
    """Merge, write, read back; the logits of what was read.

    Raises ModelError if something else was read than written.
    """
    with phase("merging in float32"):
        merged, policy = merge(config, trained, adapter, probes)
    quantised = config.dtype not in DTYPES
    dtype = torch.float32 if quantised else getattr(torch, config.dtype)
    # A GGUF file is made of a folder, so both are there for a while.
    check_disk(out, size_of(merged, dtype) * (1 if converter is None else 2))
    folder = out if converter is None else out.with_name("merged")
    with phase("writing the merged model"):
        rounded = write_model(merged, policy, dtype, folder, config.max_shard_size, probes)
    if quantised:
        with phase(f"rounding to {config.dtype}, to compare"):
            round_to_q8_0(merged)
            rounded = logits_of(merged, policy, probes)
    if converter is None:
        with phase("loading what was written, and comparing"):
            found = read_model(folder, policy, probes)
    else:
        out.mkdir()
        file = out / gguf_name(config.dtype)
        with phase(f"converting with {converter.name}"):
            convert(converter, folder, file, policy.tokenizer, ["--outtype", OUTTYPES[config.dtype]])
        shutil.rmtree(folder)
        try:
            with phase(f"loading {file.name}"):
                read = _exported(config, out)
        except ModelError as error:
            raise ModelError(f"what {converter} wrote cannot be read back: {error}") from None
        texts = [str(policy.tokenizer.decode(ids)) for ids, _ in probes]
        others = check_tokenizer(file, read.tokenizer, policy, texts)
        if others:
            print_warning(
                f"transformers tokenises {others} of {len(texts)} texts otherwise when it reads the tokenizer from "
                f"{file.name}; llama.cpp's own tokenizer may be right, compare it before you rely on it"
            )
        with phase("comparing"):
            found = logits_of(read.model, read, probes)
        (out / "Modelfile").write_text(modelfile(file.name, policy, config.prompt, config.sampling), encoding="utf-8")
    check_same(rounded, found, SAME, "what was read back is not what was written")
    return found


def gguf_name(dtype: str) -> str:
    return f"model-{OUTTYPES[dtype]}.gguf"


def _exported(config: ExportConfig, out: Path) -> Policy:
    """What was written, as the tool would load it."""
    if config.format == "adapter":
        return load_trained(config, out)
    model = Model(str(out), None, gguf_name(config.dtype) if config.format == "gguf" else None)
    hardware = replace(config.hardware, dtype="float32") if config.format == "gguf" else config.hardware
    return load_policy(model, hardware, warn=print_warning)


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


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
