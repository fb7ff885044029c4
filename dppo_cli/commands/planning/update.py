"""The run's own update, on fake tensors: the memory that it holds and the work that it does.

Shapes: B sequences, N sampled tokens, C of them at a time, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY, Approximation
from dppo_cli.commands.planning.attention import counted_attention
from dppo_cli.commands.planning.recorder import Recorder, Work
from dppo_cli.commands.planning.shapes import Shapes
from dppo_cli.config.sections import Hardware
from dppo_cli.policy.choice import choose_for
from dppo_cli.policy.forward import Forward
from dppo_cli.policy.head import Head, token_log_probs
from dppo_cli.types import Batch, PaddedPrompts, PolicyReport, Prompt

PROMPTS_AT_ONCE = 2
"""Micro-batches of prompts that are run here; the keys and values of further prompts are multiples of theirs."""


@dataclass(frozen=True)
class UpdateCost:
    """Bytes of a micro-batch, and the work of a whole update."""

    micro_batches: int
    samples: int  # of this micro-batch
    positions: int  # that run in it
    prompt_states: int
    activations: int
    head: int
    backward: int
    prompts_backward: int
    work: Work


def update_cost(
    shapes: Shapes,
    prompts: Sequence[Prompt],
    group: int,
    max_new_tokens: int,
    hardware: Hardware,
    approx: Approximation,
    reference: bool,
) -> UpdateCost:
    """Of `group` samples of `max_new_tokens` tokens to each of `prompts`. `reference`: the base runs them, too."""
    policy, recorder, budget = shapes.policy, Recorder(shapes.tensors()), hardware.tokens_per_micro_batch
    owners = [p for p in range(len(prompts)) for _ in range(group)]
    lengths = [len(prompts[p].token_ids) for p in owners]
    samples = [(p, n, max_new_tokens) for p, n in zip(owners, lengths, strict=True)]
    token_ids = {p: prompt.token_ids for p, prompt in enumerate(prompts)}
    kind = choose_for(policy, token_ids, samples, budget)
    parts = kind.split(samples, budget)
    part = max(parts, key=lambda part: (len(part), max(lengths[i] for i in part)))
    here = dict.fromkeys(owners[i] for i in part)
    here.update(dict.fromkeys(_some(prompts, PROMPTS_AT_ONCE * budget)))
    numbers = list(here)
    # What is indexed with has real values; it is small.
    batch = _batch(numbers, [owners[i] for i in part], prompts, max_new_tokens)
    given = {p: prompts[p].token_ids for p in numbers}
    with shapes.mode, counted_attention(recorder, shapes.on_cpu), recorder:
        forward = kind(policy, given, budget)
        if reference:
            with torch.no_grad(), policy.without_adapter():
                base: Forward = kind(policy, given, budget)
                _log_probs(policy.head, base, batch, hardware.head_chunk)
        states, of_prompts, before = recorder.live, recorder.work, forward.num_positions
        recorder.restart_peak()
        hidden_NH = forward.predicting_states(batch)
        run, positions = recorder.live, forward.num_positions - before
        recorder.restart_peak()
        anchor = _report(approx, policy.head, hidden_NH)

        def measure(rows: slice, log_pi_CV: torch.Tensor) -> None:
            logp_C = log_pi_CV.gather(-1, batch.token_N[rows, None]).squeeze(-1)
            approx.support(anchor[rows], batch.token_N[rows], logp_C, log_pi_CV)

        logp_N, _ = token_log_probs(policy.head, hidden_NH, batch.token_N, hardware.head_chunk, measure)
        head, kept = recorder.restart_peak() - run, recorder.live
        del hidden_NH
        logp_N.sum().backward()
        del logp_N
        backward = recorder.restart_peak() - kept
        of_batch = recorder.work.less(of_prompts)
        left, done = recorder.live, recorder.work
        forward.backward()
        prompts_backward = recorder.restart_peak() - left
        of_prompts = of_prompts.plus(recorder.work.less(done))
    more = len(prompts) / len(numbers)
    return UpdateCost(
        micro_batches=len(parts),
        samples=len(part),
        positions=positions,
        # Keys and values of the prompts that were left out, each with its gradient.
        prompt_states=round(states * (2 * more - 1)),
        activations=kept - states,
        head=head,
        backward=backward,
        prompts_backward=prompts_backward + left - states,
        work=of_batch.times(len(owners) / len(part)).plus(of_prompts.times(more)),
    )


def _log_probs(head: Head, forward: Forward, batch: Batch, chunk: int) -> None:
    token_log_probs(head, forward.predicting_states(batch), batch.token_N, chunk)


def _some(prompts: Sequence[Prompt], tokens: int) -> list[int]:
    """The first prompts, as many as have so many tokens."""
    found: list[int] = []
    for p, prompt in enumerate(prompts):
        tokens -= len(prompt.token_ids)
        if found and tokens < 0:
            break
        found.append(p)
    return found


def _batch(numbers: Sequence[int], owners: Sequence[int], prompts: Sequence[Prompt], length: int) -> Batch:
    """As `Batch.pack` would lay out responses of `length` tokens; it looks at values, which fake tensors lack."""
    used = list(dict.fromkeys(owners))
    size = len(owners)
    return Batch(
        prompts=PaddedPrompts.pad([prompts[p].token_ids for p in used], 0, torch.device("cpu")),
        number_P=tuple(used),
        prompt_B=torch.tensor([used.index(p) for p in owners]),
        response_ids_BR=torch.zeros(size, length, dtype=torch.int64),
        length_B=torch.full((size,), length),
        row_N=torch.arange(size).repeat_interleave(length),
        position_N=torch.arange(length).repeat(size),
        token_N=torch.zeros(size * length, dtype=torch.int64),
        advantage_N=torch.ones(size * length),
        mu=PolicyReport(torch.zeros(size * length)),
        anchor=PolicyReport(torch.zeros(size * length)),
    )


def _report(approx: Approximation, head: Head, hidden_NH: torch.Tensor) -> PolicyReport:
    """What the sampler reported of these tokens."""
    n, k = hidden_NH.shape[0], approx.num_logprobs
    logp_N = torch.empty(n)
    if k == WHOLE_VOCABULARY:
        return PolicyReport(logp_N, hidden_NH=torch.empty_like(hidden_NH.detach()), head=head)
    if k:
        return PolicyReport(logp_N, torch.empty(n, k, dtype=torch.int64), torch.empty(n, k))
    return PolicyReport(logp_N)
