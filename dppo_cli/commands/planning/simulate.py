"""The run's own sampling and update, on fake tensors: the memory they hold and the work they do.

Shapes: B sequences, N sampled tokens, C of them at a time, V vocabulary, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY, Approximation
from dppo_cli.commands.planning.recorder import Recorder
from dppo_cli.commands.planning.shapes import Shapes
from dppo_cli.config.sections import Hardware, Sampling
from dppo_cli.kernels.slots import Room
from dppo_cli.policy.choice import choose_for
from dppo_cli.policy.forward import Forward
from dppo_cli.policy.head import Head, masses, token_log_probs
from dppo_cli.rollout.copies import Sampler
from dppo_cli.rollout.decoder import Decoder, PreallocatedLayer
from dppo_cli.rollout.record import Record
from dppo_cli.rollout.sampling import draw
from dppo_cli.rollout.static import prefill as run_prompts
from dppo_cli.types import Batch, Example, PaddedPrompts, PolicyReport, Prompt

PROMPTS_AT_ONCE = 2
"""Micro-batches of prompts that are run here; the keys and values of further prompts are multiples of theirs."""


@dataclass(frozen=True)
class Work:
    """FLOPs, bytes of the tensors that are made, and operations."""

    flops: float = 0.0
    made: float = 0.0
    operations: float = 0.0

    def times(self, factor: float) -> "Work":
        return Work(self.flops * factor, self.made * factor, self.operations * factor)

    def plus(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.made + other.made, self.operations + other.operations)


@dataclass(frozen=True)
class SamplingCost:
    """Bytes of a sub-batch: the cache of keys and values, logits and what is drawn from them, what is recorded.

    `slots`: of the cache, what is in slots, which may stay while the policy trains.
    """

    cache: int
    slots: int
    logits: int
    record: int
    step: int  # what a token needs besides
    prefill_peak: int
    prefill: Work
    token: Work


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


def sampling_cost(
    shapes: Shapes,
    prompts: Sequence[Prompt],
    group: int,
    sampling: Sampling,
    num_logprobs: int,
    room: Room | None = None,
) -> SamplingCost:
    """Of `prompts` with `group` samples each: the beginning, and the last token, which attends to all others.

    `room`: of keys and values, where the engine takes static steps; the work of a token is about the same.
    """
    policy, recorder = shapes.policy, Recorder(shapes.tensors())
    training = policy.model.training
    policy.model.eval()
    with shapes.mode, recorder, torch.no_grad(), policy.autocast():
        head = policy.head.at(sampling.temperature or 1.0)
        decoder = Decoder(policy.model, prompts, group, sampling.max_new_tokens, policy.pad_id)
        hidden_BH = decoder.prefill()
        size = len(prompts) * group
        prefill_peak, cache, prefill = recorder.restart_peak(), recorder.live, _work(recorder)
        record = Record(size, sampling.max_new_tokens, head, num_logprobs)
        buffer_BV = hidden_BH.new_empty(size, head.weight_VH.shape[0], dtype=torch.float32)
        before = recorder.live
        logits_BV, mass_BV, total_B1 = masses(head.tempered(head.product(hidden_BH)), buffer_BV)
        token_B = draw(mass_BV, torch.empty(size))
        logits_peak = recorder.restart_peak() - before + buffer_BV.nbytes
        with_logits = recorder.live
        record.add(torch.arange(size), token_B, logits_BV, total_B1.log(), hidden_BH)
        kept = recorder.live - with_logits
        del logits_BV, mass_BV, total_B1
        _at_the_end(decoder)
        recorder.restart_peak()
        start, done = recorder.live, _work(recorder)
        decoder.step(token_B)
        step = recorder.peak - start
        token = _less(_work(recorder), done).plus(_less(done, prefill))
        slots = 0
        if room is not None:
            whole = sum(buffer.nbytes for layer in decoder.cache.layers for buffer in layer.buffers)  # type: ignore[union-attr]
            slots = whole // (size * decoder.capacity) * room.all_positions
            cache += slots - whole
            kept = kept * (room.positions + 1) // sampling.max_new_tokens
            del decoder
            recorder.restart_peak()
            start = recorder.live
            # While the slots of the step before are there.
            run_prompts(
                Sampler(policy.model, head, head.product, policy.autocast), prompts, policy.pad_id, policy.device
            )
            prefill_peak = cache + recorder.peak - start
    policy.model.train(training)
    return SamplingCost(cache, slots, logits_peak, kept, step, prefill_peak, prefill, token)


def _at_the_end(decoder: Decoder) -> None:
    """Go on as if all tokens but the last were written."""
    layers = decoder.cache.layers
    if all(isinstance(layer, PreallocatedLayer) for layer in layers):
        for layer in layers:
            assert isinstance(layer, PreallocatedLayer)
            layer._show(decoder.capacity - 1)
        decoder.written = decoder.capacity - decoder.width - 1


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
    with shapes.mode, recorder:
        forward = kind(policy, given, budget)
        if reference:
            with torch.no_grad(), policy.without_adapter():
                base: Forward = kind(policy, given, budget)
                _log_probs(policy.head, base, batch, hardware.head_chunk)
        states, of_prompts, before = recorder.live, _work(recorder), forward.num_positions
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
        of_batch = _less(_work(recorder), of_prompts)
        left, done = recorder.live, _work(recorder)
        forward.backward()
        prompts_backward = recorder.restart_peak() - left
        of_prompts = of_prompts.plus(_less(_work(recorder), done))
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


def _work(recorder: Recorder) -> Work:
    return Work(recorder.flops, recorder.made, recorder.operations)


def _less(after: Work, before: Work) -> Work:
    return after.plus(before.times(-1))


def assumed_prompts(count: int, tokens: int) -> list[Prompt]:
    """Prompts of a length, no two of which begin alike."""
    return [Prompt(i, Example("", ""), (i, *[0] * (tokens - 1))) for i in range(count)]
