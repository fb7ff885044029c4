"""Sampling in this process, with the log-probs of every token it samples.

Each distinct prompt is run once and its key-value cache shared out to its samples; the cache has room for the whole
response; finished sequences leave the batch; no [steps, sequences, vocabulary] tensor exists.

Shapes: P prompts, G samples per prompt, B = P x G sequences of a sub-batch, A of them still being written, L padded
prompt length, V vocabulary, K reported log-probs, H hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dppo_cli.config.checks import check_choice, check_rules
from dppo_cli.config.sections import LoRA, Sampling
from dppo_cli.errors import ConfigError
from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.memory import return_freed_memory
from dppo_cli.kernels.products import emulates_bfloat16
from dppo_cli.policy.head import masses
from dppo_cli.policy.policy import Policy, model_head
from dppo_cli.rollout.completions import completion
from dppo_cli.rollout.copies import Sampler, SamplingCopy
from dppo_cli.rollout.decoder import Decoder, compact
from dppo_cli.rollout.engine import seeds_of
from dppo_cli.rollout.record import Record
from dppo_cli.rollout.refill import Refilling, refuses
from dppo_cli.rollout.sampling import Sampled, Wanted, draw, truncate
from dppo_cli.rollout.stop_strings import StopStrings
from dppo_cli.rollout.weights import KINDS, SamplingWeights, check_weights, decide
from dppo_cli.types import Completion, Prompt

STEPS_UNREAD = 8
"""Steps from one look at which sequences have ended to the next, on CUDA. Each look costs the device a pause, in which
the host prepares the next step; sequences that have ended run on until then, for nothing."""


@dataclass(frozen=True)
class LocalRollout:
    """The in-process engine; see conf/rollout/local.yaml for the fields."""

    weights: str
    dtype: str | None
    concurrent_sequences: int
    max_logprobs: int

    def __post_init__(self) -> None:
        check_choice("rollout.dtype", self.dtype, (None, "float32", "bfloat16", "float16"))
        check_choice("rollout.weights", self.weights, KINDS)
        rules = {
            "concurrent_sequences >= 1": self.concurrent_sequences >= 1,
            "max_logprobs >= 1": self.max_logprobs >= 1,
        }
        check_rules("rollout", self, rules)

    def check(self, num_logprobs: int, adapter: LoRA | None) -> None:
        if num_logprobs > self.max_logprobs:
            raise ConfigError(
                f"approx.k={num_logprobs} is more than rollout.max_logprobs={self.max_logprobs}, the longest list this "
                "engine keeps; lower approx.k, or use approx=full, which is exact and needs no list"
            )
        check_weights(self.weights, self.dtype, adapter is not None and adapter.quantization is not None)

    def load(self, policy: Policy, warn: Callable[[str], None]) -> "LocalEngine":
        weights = decide(self.weights, self.dtype, policy)
        if weights.dtype != policy.dtype and emulates_bfloat16(policy.device, weights.dtype):
            warn(
                "rollout.dtype=bfloat16 on a processor without bfloat16 is some 300 times slower than float32; leave "
                "rollout.dtype=null"
            )
        if weights.kind == "merged" and weights.dtype != torch.float32:
            warn(
                f"rollout.weights=merged in {str(weights.dtype).removeprefix('torch.')} rounds small updates away: the "
                "sampler is another policy than the one in training; rollout.weights=auto keeps the adapter beside them"
            )
        on_cuda = policy.device.type == CUDA
        refilling = Refilling(policy, self.concurrent_sequences, warn) if on_cuda else None
        return LocalEngine(policy, weights, self.concurrent_sequences, refilling)


class LocalEngine:
    """See `RolloutEngine`. Reads the policy's weights whenever it samples, so a sync only counts the version.

    `refilling`: how it samples from models that this knows; None: sub-batch by sub-batch, as from all others.
    """

    def __init__(
        self,
        policy: Policy,
        weights: SamplingWeights,
        concurrent_sequences: int,
        refilling: Refilling | None = None,
    ) -> None:
        self.policy = policy
        self.weights = weights
        self.concurrent_sequences = concurrent_sequences
        self.refilling = refilling
        self.copy: SamplingCopy | None = None
        self.stops: StopStrings | None = None
        self.version: int | None = None

    def __enter__(self) -> "LocalEngine":
        if self.weights.copied:
            kind = self.weights.kind
            self.copy = SamplingCopy(self.policy.model, self.weights.dtype, kind == "merged", kind == "quantized")
        return self

    def __exit__(self, *_: object) -> None:
        self.copy = self.version = None
        if self.refilling is not None:
            self.refilling.release()

    @property
    def samples_with(self) -> str:
        return f"{self.weights}{'' if self.refilling is None else f'; {self.refilling.how(self.policy.model)}'}"

    def sync(self, version: int) -> None:
        self.version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples_per_prompt: int,
        sampling: Sampling,
        num_logprobs: int,
        seed: int,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, list[Completion]]]:
        assert self.version is not None, "sync the engine before its first use"
        seeds = seeds_of(prompts, seed, numbers)
        return self._groups(Wanted(prompts, samples_per_prompt, sampling, num_logprobs, seeds))

    def _groups(self, wanted: Wanted) -> Iterator[tuple[int, list[Completion]]]:
        sampling = wanted.sampling
        return_freed_memory()  # what training has freed, and at the end what sampling has
        with self.copy.filled() if self.copy else self._policy_itself() as sampler:
            sampler = replace(sampler, head=sampler.head.at(sampling.temperature or 1.0))
            refills = self.refilling is not None and refuses(sampler.model) is None
            sampled = self._refilled if refills else self._in_parts
            for number, responses in sampled(sampler, wanted):
                assert self.version is not None
                yield number, [completion(self.policy, *of, sampling.stop, self.version) for of in responses]
        return_freed_memory()

    def _refilled(self, sampler: Sampler, wanted: Wanted) -> Iterator[tuple[int, list[Sampled]]]:
        assert self.refilling is not None
        stop = wanted.sampling.stop
        groups = self.refilling.sample(sampler, wanted, self._stop_strings(stop) if stop else None)
        while True:
            # Left at each group, as inference mode is: whoever takes it runs in a mode of its own.
            with sampler.mode():
                found = next(groups, None)
            if found is None:
                return
            yield found

    def _in_parts(self, sampler: Sampler, wanted: Wanted) -> Iterator[tuple[int, list[Sampled]]]:
        group = wanted.group
        at_once = max(1, self.concurrent_sequences // group)
        for start in range(0, len(wanted.prompts), at_once):
            of_part = slice(start, start + at_once)
            part = replace(wanted, prompts=wanted.prompts[of_part], seeds=wanted.seeds[of_part])
            size = len(part.prompts)
            record = Record(size * group, part.sampling.max_new_tokens, sampler.head, part.num_logprobs)
            steps = self._sample(sampler, record, part)
            waiting = list(range(size))
            while waiting:
                with sampler.mode():  # not longer, as above
                    ended = next(steps, waiting)
                waiting = [number for number in waiting if number not in ended]
                reports = record.reports([number * group + g for number in ended for g in range(group)])
                for number in ended:
                    yield start + number, [next(reports) for _ in range(group)]

    @contextmanager
    def _policy_itself(self) -> Iterator[Sampler]:
        """In the precision in which it is trained, without the adapter's dropout."""
        model = self.policy.model
        training = model.training
        model.eval()  # of all groups: for each one it would take as long as a token of a small model
        try:
            head = model_head(model)
            yield Sampler(model, head, head.product, self.policy.autocast)
        finally:
            model.train(training)

    # A tenth faster than no_grad on a CPU: thousands of small operations a token keep no account of what they change.
    # Of a generator torch ends the mode at each yield.
    @torch.inference_mode()
    def _sample(self, sampler: Sampler, record: Record, wanted: Wanted) -> Iterator[list[int]]:
        """One sub-batch, from its prompts to the last token.

        Yields the numbers of the prompts that were seen to have no sample left to write. The others' have ended, too,
        when it ends.
        """
        head, device, sampling, group = sampler.head, self.policy.device, wanted.sampling, wanted.group
        eos_E = torch.tensor(self.policy.eos_ids, device=device)
        stops = self._stop_strings(sampling.stop) if sampling.stop else None
        decoder = Decoder(sampler.model, wanted.prompts, group, sampling.max_new_tokens, self.policy.pad_id)
        active_A = torch.arange(record.size, device=device)
        here_A = torch.arange(record.size)  # the same on the host
        left_P = [group] * len(wanted.prompts)
        # Stop strings are looked for on the host, at every step.
        every = STEPS_UNREAD if device.type == CUDA and stops is None else 1
        # One for every sequence at every step, so that a token does not depend on which others have finished or are in
        # the sub-batch; all at once, because sending them to the device waits for it.
        shape = (sampling.max_new_tokens, group)
        uniforms = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in wanted.seeds]
        uniform_TB = torch.cat(uniforms, 1).to(device)
        hidden_AH = decoder.prefill()
        # Allocated once: the system would have to find and clear this much memory for every token.
        buffer_BV = hidden_AH.new_empty(record.size, head.weight_VH.shape[0], dtype=torch.float32)
        for uniform_B in uniform_TB:
            # log mu = logits - log_total; over the whole vocabulary only where something asks for it.
            logits_AV = head.tempered(sampler.product(hidden_AH))
            logits_AV, mass_AV, total_A1 = masses(logits_AV, buffer_BV[: len(hidden_AH)])
            log_total_A1 = total_A1.log()
            if sampling.temperature == 0:
                token_A = logits_AV.argmax(-1)
            else:
                if sampling.truncates:
                    mass_AV = truncate(logits_AV - log_total_A1, sampling).exp()
                token_A = draw(mass_AV, uniform_B[active_A])
            record.add(active_A, token_A, logits_AV, log_total_A1, hidden_AH)
            record.writing_B[active_A] &= ~torch.isin(token_A, eos_E)
            if stops is not None:
                record.writing_B[active_A] &= ~stops.ended(record.tokens(), active_A).to(device)
            if record.steps == sampling.max_new_tokens:
                break
            del logits_AV  # freed before the next step's are made
            ended: list[int] = []
            if record.steps % every == 0:
                writing_A = _still_writing(record.writing_B[active_A])
                if not writing_A.any():
                    break
                if not writing_A.all():
                    ended = _without_samples_left(left_P, here_A[~writing_A].tolist(), group)
                    rows, here_A = compact(writing_A, device), here_A[compact(writing_A, here_A.device).kept_A]
                    decoder.keep(rows)
                    active_A, token_A = active_A[rows.kept_A], token_A[rows.kept_A]
            hidden_AH = decoder.step(token_A)
            # Only now, so that a GPU has something to do meanwhile.
            if ended:
                yield ended

    def _stop_strings(self, strings: Sequence[str]) -> StopStrings:
        """Made once: it looks at the whole vocabulary."""
        if self.stops is None or self.stops.strings != tuple(strings):
            self.stops = StopStrings(strings, self.policy.tokenizer)
        return self.stops


def _still_writing(writing_A: Tensor) -> Tensor:
    """Bool [A] on the CPU. The one place where the host waits for the device."""
    return writing_A.cpu()


def _without_samples_left(left_P: list[int], ended: Sequence[int], group: int) -> list[int]:
    """Take the sequences that have ended off `left_P`; the prompts that have none left by that."""
    for sequence in ended:
        left_P[sequence // group] -= 1
    return sorted({sequence // group for sequence in ended if left_P[sequence // group] == 0})
