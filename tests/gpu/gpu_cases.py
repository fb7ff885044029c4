"""What is checked on a GPU, as functions of the device, so that the ordinary suite runs them on a CPU, too."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import make
import pytest
import torch
from helpers import read_json, read_lines, train
from safetensors.torch import load_file

from dppo_cli.cli.main import main
from dppo_cli.commands.assembly import make_learner
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.kernels.probe import apart
from dppo_cli.kernels.segment_kernels import Kernel, Plain, choose_kernel
from dppo_cli.kernels.segments import Segments, attend
from dppo_cli.policy.forward import Forward, WholeSequences
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.packed_forward import PackedGroups, can_pack
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.rollout.local import LocalEngine
from dppo_cli.types import Completion, PolicyReport, Prompt

FLOOR = {torch.bfloat16: 2e-3, torch.float32: 1e-5}
"""Mean |pi - mu| that is rounding. Where a tiny model's products do not depend on the size of a micro-batch at all, the
trainer agrees with itself exactly, and no sampler could pass."""

ROUNDING = {torch.bfloat16: 0.03, torch.float32: 1e-4}
"""|g - g'| / |g| that is rounding, of gradients."""
UNMASKED = ("divergence.delta_low=1", "divergence.delta_high=1")
"""Random tokens are far from the policy; this keeps them all."""
ATTENTION = {torch.bfloat16: 0.03, torch.float32: 1e-5}
"""The same of one attention, of the largest entry."""


def runs(device: str, model: Path, run: Path, *words: str, agrees: bool = True) -> list[dict[str, Any]]:
    """Two steps of a tiny model end well; the lines of its metrics.

    `agrees`: sampler and trainer are one policy but for rounding; dropout makes them two.
    """
    rates = ("optim.lr=0.01", f"hardware.device={device}", "hardware.dtype=auto")
    assert train(model, *rates, f"run_dir={run}", *words) == 0
    rows, summary = read_lines(run / "metrics.jsonl"), read_json(run / "summary.json")
    assert [row["step"] for row in rows] == [1, 2] and summary["peak_memory_gib"] > 0
    for row in rows:
        apart = row["mismatch_mean"]
        assert not agrees or apart is None or apart < (2e-2 if device == "cuda" else 1e-5)
    weights = load_file(run / "adapter/adapter_model.safetensors")
    moved = [w for name, w in weights.items() if "lora_B" in name and w.any()]
    assert moved and all(w.isfinite().all() for w in weights.values())
    return rows


def sampler_agrees_with_the_trainer(config: TrainConfig, device: str, dtype: str) -> tuple[float, float]:
    """Mean |pi - mu| at step 0, and that of the trainer against itself with smaller micro-batches; compared."""
    hardware = replace(config.hardware, device=device, dtype=dtype)
    # A CPU may have no bfloat16, which is a warning.
    policy = load_policy(config.model, hardware, warn=lambda _: None, adapter=config.adapter)
    make.move_adapter(policy, 0.05)
    prompts = make.prompts(policy)
    with config.rollout.load(policy, make.fail) as engine:
        engine.sync(0)
        sampled = in_order(engine.generate(prompts, 4, config.sampling, config.approx.num_logprobs, seed=3))
    mu_N = make.reported(sampled).logp_N.exp()
    large, small = (
        _anchors(replace(config, hardware=replace(hardware, tokens_per_micro_batch=budget)), policy, prompts, sampled)
        for budget in (2048, 24)
    )
    assert mu_N.shape == large.shape == small.shape and mu_N.numel() > 16
    apart, own = float((large - mu_N).abs().mean()), float((large - small).abs().mean())
    assert apart <= max(1.5 * own, FLOOR[policy.dtype]), f"|pi - mu| {apart:.2g}, the trainer's own {own:.2g}"
    return apart, own


def _anchors(
    config: TrainConfig, policy: Any, prompts: Sequence[Prompt], sampled: Sequence[Sequence[Completion]]
) -> torch.Tensor:
    """pi of each sampled token by the learner's own forward."""
    groups = make.groups(prompts, sampled, [1.0] * sum(map(len, sampled)))
    anchored = make_learner(policy, config).anchored(groups)
    return PolicyReport.cat([anchor for group in anchored for anchor in group.anchors or []]).logp_N.exp()


def packed_updates_agree_with_whole_sequences(config: TrainConfig, device: str, dtype: str) -> tuple[float, float]:
    """|g - g'| / |g| of gradients of packed rows, and of whole sequences; compared.

    g is that of whole sequences in float32. Where these are what is tried, others of them are in smaller micro-batches.
    """
    policy = _moved(config, device, dtype)
    assert can_pack(policy.model)
    generator = torch.Generator().manual_seed(0)
    sampled = [
        [make.completion(torch.randint(3, 70, (n,), generator=generator).tolist(), logp=[-4.0] * n) for n in of]
        for of in ((7, 1, 40, 4), (9,), (1, 1), (130, 5, 64))
    ]
    signs = [1.0 if i % 2 else -1.0 for i in range(sum(map(len, sampled)))]
    groups = make.groups(make.prompts(policy), sampled, signs)

    def gradient(of: Policy, forward: type[Forward], budget: int) -> torch.Tensor:
        before = [p.detach().clone() for p in of.parameters]
        learner = make_learner(of, replace(config, hardware=replace(config.hardware, tokens_per_micro_batch=budget)))
        learner.forward, seen = forward, []
        learner.optimizer.register_step_pre_hook(
            lambda *_: seen.extend(p.grad.flatten().to("cpu", copy=True) for p in of.parameters)
        )
        learner.update(groups)
        for parameter, value in zip(of.parameters, before, strict=True):
            parameter.data.copy_(value)
        return torch.cat(seen)

    packed = gradient(policy, PackedGroups, 2048)
    exact = gradient(_moved(config, device, "float32"), WholeSequences, 2048)
    whole = gradient(policy, WholeSequences, 24 if policy.dtype == torch.float32 else 2048)
    assert exact.norm() > 0
    apart, own = (float((g - exact).norm() / exact.norm()) for g in (packed, whole))
    floor = 1e-4 if policy.dtype == torch.float32 else 5e-3
    assert apart <= max(1.5 * own, floor), f"packed {apart:.2g}, whole sequences' own {own:.2g}"
    return apart, own


def _moved(config: TrainConfig, device: str, dtype: str) -> Policy:
    hardware = replace(config.hardware, device=device, dtype=dtype)
    policy = load_policy(config.model, hardware, warn=lambda _: None, adapter=config.adapter)
    make.move_adapter(policy, 0.05)
    return policy


def attention_over_segments_agrees_with_plain_operations(
    device: str, dtype: torch.dtype, kernel: type[Kernel]
) -> float:
    """The largest error of output and gradients, relative to the largest entry; equal calls give equal bits."""
    pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
    rows = (Segments((300, 5, 70, 9), ((130, 1, 257), (64, 64), (2,), ())), Segments((3, 40), ((), ())))
    for row, heads, size, window in itertools.product(rows, ((8, 2), (3, 3)), (64, 128, 256), (None, 100)):
        generator = torch.Generator().manual_seed(0)
        tokens = sum(row.prompts) + sum(map(sum, row.responses))
        of = [torch.randn(tokens, n, size, generator=generator).to(device, dtype) for n in (*heads, heads[1])]
        of = [x.requires_grad_() for x in of]
        assert choose_kernel(of[0], of[1].shape[1], window) is kernel

        def found(
            of: list[torch.Tensor], chosen: type[Kernel], row: Segments = row, window: int | None = window
        ) -> list[torch.Tensor]:
            out = attend(*of, row, 0.1, chosen, window)
            return [out.detach(), *torch.autograd.grad((out * torch.cos(out.detach())).sum(), of)]

        # Of plain operations torch would ask for a setting of cuBLAS that takes effect at the start of a process.
        torch.use_deterministic_algorithms(kernel is not Plain)
        try:
            first, second = found(of, kernel), found(of, kernel)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        right = found([x.detach().double().requires_grad_() for x in of], Plain)
        pairs += zip(first, right, strict=True)
    worst = apart(pairs)
    assert worst <= ATTENTION[dtype], f"relative error {worst:.2g}"
    return worst


def equal_commands_give_equal_tokens(device: str, model: Path, folder: Path) -> None:
    """All that was sampled in two steps, token by token with its log-probs, and what the evaluations say."""
    found = []
    for name in ("first", "second"):
        rows = runs(device, model, folder / name, "samples.every=1", "samples.groups=2", "samples.max_mib=8")
        kept = [read_lines(folder / name / f"samples/step-{step}.jsonl") for step in (1, 2)]
        found.append(([row["tokens"] for step in kept for row in step], [row["reward"] for row in rows]))
    assert found[0] == found[1] and len(found[0][0]) == 16


def learns(device: str, run: Path) -> None:
    """The default run: 32% before, at least 80% after."""
    assert main(["train", f"hardware.device={device}", f"run_dir={run}"]) == 0
    summary = read_json(run / "summary.json")
    assert 0.25 <= summary["eval_before"] <= 0.40 and summary["eval_after"] >= 0.80


def memory_that_runs_out_ends_in_a_line(
    device: str,
    model: Path,
    run: Path,
    full: Callable[[], Any],
    patch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the rollout of step 2; step 1 is saved, and the run goes on from there. `full`: a context with no memory."""
    generate, calls = LocalEngine.generate, []

    def generated(*args: Any) -> Any:
        calls.append(len(calls))
        if len(calls) != 3:  # the evaluation, step 1, step 2
            yield from generate(*args)
            return
        with full():
            yield from generate(*args)

    words = (f"hardware.device={device}", "hardware.dtype=auto", "optim.lr=0.01", f"run_dir={run}", "resume=auto")
    with patch.context() as patched:
        patched.setattr(LocalEngine, "generate", generated)
        assert train(model, *words) == 2
    error = capsys.readouterr().err
    assert "dppo: out of memory" in error and "Traceback" not in error
    assert len(error.strip().splitlines()) <= 2
    assert (run / "checkpoints/step-1").is_dir() and len(read_lines(run / "metrics.jsonl")) == 1
    assert train(model, *words) == 0
    assert [row["step"] for row in read_lines(run / "metrics.jsonl")] == [1, 2]


@contextmanager
def a_full_gpu() -> Iterator[None]:
    """No byte is left: the process may have no more than it holds, and what its allocator holds free is taken."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    taken: list[torch.Tensor] = []
    try:
        for size in (2**20, 2**14, 2**9):
            try:
                while True:
                    taken.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.OutOfMemoryError:
                pass
        yield
    finally:
        taken.clear()
        torch.cuda.set_per_process_memory_fraction(1.0)
