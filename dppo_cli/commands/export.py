"""`dppo export`: the adapter for PEFT, or the model with the adapter merged in for plain transformers.

A merge happens in float32. What was written is read back and compared with the trained policy, on responses that the
policy samples to held-out prompts.
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

from dppo_cli.commands.schemas import BASES, DTYPES, FORMATS, ExportConfig
from dppo_cli.commands.trained import CONFIG, TrainedRun, folder_of, open_run, run_config
from dppo_cli.config.checks import check_choice
from dppo_cli.config.saved import read_config
from dppo_cli.config.sections import Hardware, Sampling
from dppo_cli.errors import ModelError, RunError
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.copies import base_weight, quantised_layers
from dppo_cli.telemetry.table import percent, print_table, print_warning
from dppo_cli.training.agreement import Agreement, agreement
from dppo_cli.training.card import card
from dppo_cli.training.evaluation import EvalResult, evaluate
from dppo_cli.training.run_folder import check_disk, check_free

PROBE_PROMPTS, PROBE_TOKENS = 8, 32
"""Prompts, and tokens of a response to each, on which the export and the trained policy are compared."""

PLAIN_CPU = Hardware("cpu", "float32", tokens_per_micro_batch=8192, head_chunk=256, gradient_checkpointing=False)
"""Where an export is compared unless the user says otherwise: exact, and wherever there is memory for the base."""

OF_THE_RUN = ("model", "adapter", "data", "reward", "rollout", "prompt", "sampling", "eval", "seed")

MERGED, SAME = 1e-3, 1e-5
"""Largest difference of logits, as a share of the largest logit, between W + BA and W, B, A apart in float32; and
between two models of the same weights."""

Probe = tuple[list[int], int]
"""Token ids of a prompt with its response, and how many are the prompt's."""


def prepare(node: DictConfig, typed: Sequence[str]) -> DictConfig:
    """The config to build: what `node` leaves open is the run's. Raises RunError if the run cannot be used."""
    check_choice("format", node.format, FORMATS)
    check_choice("dtype", node.dtype, DTYPES)
    check_choice("base", node.base, BASES)
    own = OmegaConf.masked_copy(node, ["data", "reward"])
    base = run_config(folder_of(str(node.run)), own, bool(node.trust))
    # Unresolved, so that values of the environment stay where they are.
    given: Any = OmegaConf.to_container(base)
    sampled = {key: value for key, value in node.sampling.items() if value is not None}
    with open_dict(node):
        for name in OF_THE_RUN:
            node[name] = given[name]
        node.sampling = {**given["sampling"], "temperature": given["eval"]["temperature"], **sampled}
        node.hardware = OmegaConf.merge(asdict(PLAIN_CPU), node.hardware or {})
    return node


def run_export(config: ExportConfig, config_yaml: str) -> dict[str, Any]:
    """Write the export, read it back, compare; returns what was printed."""
    run = open_run(config.run, print_warning, config.checkpoint)
    out = Path(config.out) if config.out else run.folder / f"export-{config.format}"
    try:
        check_free(out, "out")
        if out.exists():
            raise RunError(f"out={out} exists already; name another folder, or delete it first")
        found = _write(config, run, out)
    except (OSError, SafetensorError) as error:
        raise RunError(f"out={out} cannot be written: {getattr(error, 'strerror', None) or error}") from None
    summary: dict[str, Any] = {"out": str(out), "bytes": _size(out), **asdict(found)}
    rows = [
        *_of_the_run(run),
        ("written to", str(out)),
        ("size", f"{_size(out) / 2**20:.1f} MiB"),
        ("base model", config.model.path),
        ("compared with the trained policy", f"{found.tokens} tokens of responses to held-out prompts"),
        ("mean KL, TV", f"{found.kl:.2g} nats, {found.tv:.2g} a token"),
        ("same likeliest token", f"{found.greedy:.1%}"),
        ("largest logit difference", f"{found.logit:.2g}"),
    ]
    if config.check == "accuracy":
        trained = _accuracy(_policy(config, run.adapter), config)
        exported = _accuracy(_exported(config, out), config)
        for name, result in (("trained", trained), ("exported", exported)):
            summary |= {f"accuracy_{name}": result.accuracy, f"accuracy_{name}_error": result.standard_error()}
            rows.append((f"accuracy, {name}", f"{percent(result.accuracy)} ± {percent(result.standard_error())}"))
    print_table(f"export {config.format}", rows)
    if config.format == "merged" and config.adapter.quantization is not None and config.base == "original":
        print(
            f"The policy was trained on a {config.adapter.quantization} base, and this merge uses the unquantised one: "
            "another policy, by what is shown above. base=dequantized keeps the trained one."
        )
    return summary


def _write(config: ExportConfig, run: TrainedRun, out: Path) -> Agreement:
    """Write beside `out`, check, and rename; how far what was written is from the trained policy."""
    parents = [p for p in out.parents if not p.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
            written = Path(folder) / "export"
            trained = _policy(config, run.adapter)
            probes = _probes(trained, config)
            expected = _logits(trained.model, trained, probes)
            if config.format == "adapter":
                check_disk(out, 2 * _size(run.adapter))
                written.mkdir()
                for name in ("adapter_config.json", "adapter_model.safetensors"):
                    shutil.copyfile(run.adapter / name, written / name)
                policy = _policy(config, written)
                found = _logits(policy.model, policy, probes)
                _check_same(expected, found, SAME, "the adapter that was written is not the one that was trained")
            else:
                found = _merge(config, trained, run.adapter, written, probes)
                if not all(logits.isfinite().all() for logits in found):
                    raise ModelError(f"the merged model's logits are not finite in {config.dtype}; use another dtype")
            plain: Any = OmegaConf.to_container(read_config(run.folder / CONFIG, trust=True)[0])
            (written / "README.md").write_text(card(plain, run.summary, config.format), encoding="utf-8")
            written.replace(out)
    except BaseException:
        for parent in parents:
            parent.rmdir()
        raise
    return agreement(expected, found)


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


def _policy(config: ExportConfig, adapter: Path, original: bool = False) -> Policy:
    """The policy with this adapter, on the base that the run was trained on, or on the original one in float32."""
    return load_policy(
        config.model.path,
        config.model.revision,
        replace(config.hardware, dtype="float32") if original else config.hardware,
        warn=print_warning,
        adapter=replace(config.adapter, quantization=None) if original else config.adapter,
        saved_adapter=adapter,
    )


def _exported(config: ExportConfig, out: Path) -> Policy:
    """What was written, as the tool would load it."""
    if config.format == "adapter":
        return _policy(config, out)
    return load_policy(str(out), None, config.hardware, warn=print_warning)


def _merge(config: ExportConfig, trained: Policy, adapter: Path, out: Path, probes: Sequence[Probe]) -> list[Tensor]:
    """Merge in float32, write in `config.dtype`, read back; the logits of what was read.

    Raises ModelError if the merge has changed more than rounding explains, or if something else was read than written.
    """
    policy = _policy(config, adapter, original=True)
    if config.base == "dequantized":
        for name, layer in quantised_layers(trained.model).items():
            policy.model.get_parameter(f"{name}.weight").data.copy_(base_weight(layer))
    assert policy.peft is not None
    apart = _logits(policy.model, policy, probes)
    merged = policy.peft.merge_and_unload()
    _check_same(apart, _logits(merged, policy, probes), MERGED, "the merge is not W + BA")
    _convert(merged, getattr(torch, config.dtype))
    check_disk(out, sum(p.numel() * p.element_size() for p in merged.parameters()))
    merged.save_pretrained(str(out), max_shard_size=config.max_shard_size)
    policy.tokenizer.save_pretrained(str(out))
    _convert(merged, torch.float32)
    rounded = _logits(merged, policy, probes)
    read: Any = AutoModelForCausalLM.from_pretrained(str(out), dtype=torch.float32, trust_remote_code=False)
    found = _logits(read.to(policy.device), policy, probes)
    if all(logits.isfinite().all() for logits in rounded):
        _check_same(rounded, found, SAME, "what was read back is not what was written")
    return found


def _convert(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """The weights only: what transformers computes from the config stays exact."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _probes(policy: Policy, config: ExportConfig) -> list[Probe]:
    """Held-out prompts with responses that the policy samples."""
    prompts = policy.encode(config.data.load().heldout[:PROBE_PROMPTS], config.prompt)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    room = PROBE_TOKENS if policy.positions is None else min(PROBE_TOKENS, policy.positions - longest)
    if room < 1:
        raise ModelError(f"a prompt has {longest} tokens, and {config.model.path} has {policy.positions} positions")
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=room, stop=[])
    with config.rollout.load(policy, print_warning) as engine:
        engine.sync(0)
        sampled = engine.generate(prompts, 1, sampling, 0, config.seed)
    return [
        ([*prompt.token_ids, *completion.token_ids_T.tolist()], len(prompt.token_ids))
        for prompt, completions in zip(prompts, sampled, strict=True)
        for completion in completions
    ]


@torch.no_grad()
def _logits(model: PreTrainedModel, policy: Policy, probes: Sequence[Probe]) -> list[Tensor]:
    """Logits that predict the responses' tokens, float32 [T, V] each."""
    found = []
    with policy.autocast():
        for ids, prompt in probes:
            logits_LV = model(input_ids=torch.tensor([ids], device=policy.device)).logits[0]
            found.append(logits_LV[prompt - 1 : -1].float().cpu())
    return found


def _check_same(expected: Sequence[Tensor], found: Sequence[Tensor], share: float, problem: str) -> None:
    difference = agreement(expected, found).logit
    largest = max(float(logits.abs().max()) for logits in expected)
    if not difference <= share * max(1.0, largest):  # so that NaN is a difference, too
        raise ModelError(
            f"{problem}: logits differ by {difference:.2g} (largest logit {largest:.2g}); nothing was written"
        )


def _accuracy(policy: Policy, config: ExportConfig) -> EvalResult:
    """On the run's held-out problems, sampled as in its evaluations unless the user says otherwise."""
    prompts = policy.encode(config.data.load().heldout, config.prompt)
    scorer = config.reward.load(print_warning)
    with config.rollout.load(policy, print_warning) as engine:
        engine.sync(0)
        of = config.eval
        return evaluate(engine, prompts, scorer, config.sampling, of.samples_per_prompt, of.success_reward, config.seed)


def _size(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
