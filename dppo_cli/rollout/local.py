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

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.config.checks import check_choice, check_rules
from dppo_cli.config.sections import LoRA, Sampling
from dppo_cli.errors import ConfigError, NumericalError
from dppo_cli.kernels.devices import CUDA
from dppo_cli.kernels.memory import return_freed_memory
from dppo_cli.kernels.products import emulates_bfloat16
from dppo_cli.kernels.top_k import top_k
from dppo_cli.policy.head import Head, masses
from dppo_cli.policy.policy import Policy, model_head
from dppo_cli.rollout.collect import derive_seed
from dppo_cli.rollout.copies import Sampler, SamplingCopy
from dppo_cli.rollout.decoder import Decoder, compact
from dppo_cli.rollout.sampling import draw, truncate
from dppo_cli.rollout.stop_strings import StopStrings, before_first
from dppo_cli.rollout.weights import KINDS, SamplingWeights, check_weights, decide
from dppo_cli.types import Completion, PolicyReport, Prompt, Status

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
        return LocalEngine(policy, weights, self.concurrent_sequences)


class LocalEngine:
    """See `RolloutEngine`. Reads the policy's weights whenever it samples, so a sync only counts the version."""

    def __init__(self, policy: Policy, weights: SamplingWeights, concurrent_sequences: int) -> None:
        self.policy = policy
        self.weights = weights
        self.concurrent_sequences = concurrent_sequences
        self.copy: SamplingCopy | None = None
        self.stops: StopStrings | None = None
        self.version: int | None = None

    def __enter__(self) -> "LocalEngine":
        if self.weights.copied:
            self.copy = SamplingCopy(self.policy.model, self.weights.dtype, merge=self.weights.kind == "merged")
        return self

    def __exit__(self, *_: object) -> None:
        self.copy = self.version = None

    @property
    def samples_with(self) -> str:
        return str(self.weights)

    def sync(self, version: int) -> None:
        self.version = version

    def generate(
        self, prompts: Sequence[Prompt], samples_per_prompt: int, sampling: Sampling, num_logprobs: int, seed: int
    ) -> list[list[Completion]]:
        assert self.version is not None, "sync the engine before its first use"
        at_once = max(1, self.concurrent_sequences // samples_per_prompt)
        found: list[list[Completion]] = []
        return_freed_memory()  # what training has freed, and at the end what sampling has
        with self.copy.filled() if self.copy else self._policy_itself() as sampler:
            sampler = replace(sampler, head=sampler.head.at(sampling.temperature or 1.0))
            for start in range(0, len(prompts), at_once):
                part = prompts[start : start + at_once]
                seeds = [derive_seed(seed, start + number) for number in range(len(part))]
                record = self._sample(sampler, part, samples_per_prompt, sampling, num_logprobs, seeds)
                reports = record.reports()
                found += [
                    [self._completion(*next(reports), sampling.stop) for _ in range(samples_per_prompt)] for _ in part
                ]
        return_freed_memory()
        return found

    @contextmanager
    def _policy_itself(self) -> Iterator[Sampler]:
        """In the precision in which it is trained, without the adapter's dropout."""
        model = self.policy.model
        training = model.training
        model.eval()
        try:
            with self.policy.autocast():
                head = model_head(model)
                yield Sampler(model, head, head.product)
        finally:
            model.train(training)

    # A tenth faster than no_grad on a CPU: thousands of small operations a token keep no account of what they change.
    @torch.inference_mode()
    def _sample(
        self,
        sampler: Sampler,
        prompts: Sequence[Prompt],
        group: int,
        sampling: Sampling,
        num_logprobs: int,
        seeds: Sequence[int],
    ) -> "Record":
        """One sub-batch, from its prompts, with a seed each, to the last token."""
        head, device = sampler.head, self.policy.device
        record = Record(len(prompts) * group, sampling.max_new_tokens, head, num_logprobs)
        eos_E = torch.tensor(self.policy.eos_ids, device=device)
        stops = self._stop_strings(sampling.stop) if sampling.stop else None
        decoder = Decoder(sampler.model, prompts, group, sampling.max_new_tokens, self.policy.pad_id)
        active_A = torch.arange(record.size, device=device)
        # Stop strings are looked for on the host, at every step.
        every = STEPS_UNREAD if device.type == CUDA and stops is None else 1
        # One for every sequence at every step, so that a token does not depend on which others have finished or are in
        # the sub-batch; all at once, because sending them to the device waits for it.
        shape = (sampling.max_new_tokens, group)
        uniforms = [torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
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
            if record.steps % every == 0:
                writing_A = _still_writing(record.writing_B[active_A])
                if not writing_A.any():
                    break
                if not writing_A.all():
                    rows = compact(writing_A, device)
                    decoder.keep(rows)
                    active_A, token_A = active_A[rows.kept_A], token_A[rows.kept_A]
            hidden_AH = decoder.step(token_A)
        return record

    def _stop_strings(self, strings: Sequence[str]) -> StopStrings:
        """Made once: it looks at the whole vocabulary."""
        if self.stops is None or self.stops.strings != tuple(strings):
            self.stops = StopStrings(strings, self.policy.tokenizer)
        return self.stops

    def _completion(self, token_T: Tensor, mu: PolicyReport, stop: Sequence[str]) -> Completion:
        assert self.version is not None
        token_T, mu = token_T.cpu(), mu.to(torch.device("cpu"))
        if not torch.isfinite(mu.logp_N).all():
            raise NumericalError(
                "the log-probs of a sampled response are not finite: the policy is broken. Try a lower optim.lr"
            )
        ids = token_T.tolist()
        text, stopped = self.policy.decode(ids), False
        if stop and self._stop_strings(stop).in_text(self.policy.tokenizer.decode(ids)):
            text, stopped = before_first(text, stop), True
        return Completion(
            token_ids_T=token_T,
            sampled_T=torch.ones_like(token_T, dtype=torch.bool),
            mu=mu,
            text=text,
            status=Status.FINISHED if stopped or ids[-1] in self.policy.eos_ids else Status.CUT,
            versions=(self.version,),
        )


class Record:
    """What was sampled, of `size` sequences of up to `capacity` tokens; a sequence's tokens are adjacent.

    `writing_B`: those that have not ended. What is added to the others, until they are out of the batch, is no part of
    their response.

    Its memory is allocated at the first step: [size, capacity] tokens (int64) and log-probs (float32), where asked K
    ids and log-probs a token, or the hidden state. Allocated little by little, between tensors that each step frees, it
    would leave holes too small for the next step's slightly longer tensors: 1.2 GiB after 512 steps of a small model.
    """

    def __init__(self, size: int, capacity: int, head: Head, num_logprobs: int) -> None:
        self.size, self.capacity = size, capacity
        self.head, self.num_logprobs = head, num_logprobs
        self.steps = 0
        self.length_B = torch.zeros(size, dtype=torch.int64, device=head.weight_VH.device)
        self.writing_B = torch.ones_like(self.length_B, dtype=torch.bool)
        self.columns: list[Tensor] = []  # [size, capacity, ...] each

    def add(
        self, active_A: Tensor, token_A: Tensor, logits_AV: Tensor, log_total_A1: Tensor, hidden_AH: Tensor
    ) -> None:
        """Keep the sampled token's log-prob and what the approximation asked for."""
        step = [token_A, (logits_AV.gather(-1, token_A[:, None]) - log_total_A1).squeeze(-1)]
        if self.num_logprobs > 0:
            values_AK, ids_AK = top_k(logits_AV, self.num_logprobs)
            step += [ids_AK, values_AK - log_total_A1]
        elif self.num_logprobs == WHOLE_VOCABULARY:
            step.append(hidden_AH)
        if not self.columns:
            with torch.inference_mode(False):  # for training to read them
                self.columns = [new.new_empty(self.size, self.capacity, *new.shape[1:]) for new in step]
        for column, new in zip(self.columns, step, strict=True):
            column[active_A, self.steps] = new
        self.steps += 1
        self.length_B[active_A] += self.writing_B[active_A]

    def tokens(self) -> Tensor:
        """What was sampled so far, int64 [size, steps]; rows of ended sequences mean nothing from their end on."""
        return self.columns[0][:, : self.steps]

    def reports(self) -> Iterator[tuple[Tensor, PolicyReport]]:
        """Tokens and report of each sequence, in order."""
        for b, length in enumerate(self.length_B.tolist()):
            token, logp, *more = [column[b, :length] for column in self.columns]
            report = PolicyReport(logp)
            if self.num_logprobs > 0:
                report = PolicyReport(logp, topk_ids_NK=more[0], topk_logp_NK=more[1])
            elif self.num_logprobs == WHOLE_VOCABULARY:
                report = PolicyReport(logp, hidden_NH=more[0], head=self.head)
            yield token, report


def _still_writing(writing_A: Tensor) -> Tensor:
    """Bool [A] on the CPU. The one place where the host waits for the device."""
    return writing_A.cpu()
