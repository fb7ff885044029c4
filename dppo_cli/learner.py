"""The update: from scored samples to a step of the optimizer.

A mini-batch is cut into micro-batches by a token budget. The sum of token losses is divided by one number known before
the first of them runs, so the gradient is the same however it is cut.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.algorithm.objective import Tokens, kl_to_reference
from dppo_cli.config import TrainConfig
from dppo_cli.errors import NumericalError
from dppo_cli.policy.head import Visitor, token_log_probs, top_k
from dppo_cli.policy.policy import Policy
from dppo_cli.policy.sharing import SharedPrompts, can_share, split_by_tokens
from dppo_cli.sections import AdamW
from dppo_cli.telemetry.trust_region import TokenStats
from dppo_cli.types import Batch, PolicyReport, Sample


@dataclass(frozen=True)
class UpdateResult:
    """One optimizer step. `stats`: what was seen of its tokens. `places`: tokens and padding of all micro-batches."""

    stats: list[TokenStats]
    gradient_norm: float
    lr: float
    sequences: int
    skipped_sequences: int
    places: int
    padded_places: int


class Learner:
    """Owns the optimizer. `anchored()` before the updates of a step, `update()` for each mini-batch."""

    def __init__(self, policy: Policy, config: TrainConfig) -> None:
        self.policy, self.config = policy, config
        self.head = policy.head.at(config.sampling.temperature)
        optim = config.optim
        b1, b2 = optim.betas
        self.optimizer = torch.optim.AdamW(
            policy.parameters, lr=optim.lr, betas=(b1, b2), eps=optim.eps, weight_decay=optim.weight_decay
        )
        # Now and for good: made amid the first backward pass they would cut the memory it frees into pieces. A batch of
        # which every sample is skipped leaves them zero, not absent.
        for parameter in policy.parameters:
            parameter.grad = torch.zeros_like(parameter)
        total_updates = config.steps * config.batch.updates_per_step
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda update: lr_factor(update, total_updates, optim)
        )

    def anchored(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the trainer's own report of the policy as it is now as their anchor (anchor=recompute)."""
        found: dict[int, PolicyReport] = {}
        numbered = list(enumerate(samples))
        with torch.no_grad():
            prompts = self._prompts(numbered)
        for batch, indices in self._micro_batches(numbered):
            report = self._report(batch, prompts)
            for b, index in enumerate(indices):
                found[index] = report[batch.row_N == b].to(torch.device("cpu"))
        return [replace(sample, anchor=found[i]) for i, sample in enumerate(samples)]

    def update(self, samples: Sequence[Sample]) -> UpdateResult:
        """One optimizer step on `samples`. Raises NumericalError, with no weight changed, if a gradient is not finite.

        Samples with A = 0 get no forward pass where nothing but the advantage gives a gradient: it would be zero.
        """
        config = self.config
        num_tokens = sum(s.completion.mu.logp_N.shape[0] for s in samples)
        divisor = config.aggregation.divisor(num_tokens, len(samples), config.sampling.max_new_tokens)
        # Samples without advantage go last and by themselves, so that skipping them leaves the other sums bit for bit.
        useful = [(i, s) for i, s in enumerate(samples) if s.advantage != 0]
        idle = [(i, s) for i, s in enumerate(samples) if s.advantage == 0]
        needs_idle = config.objective.needs_all_tokens or config.kl_to_reference > 0
        stats, places, padded = [], 0, 0
        for part in (useful, idle) if needs_idle else (useful,):
            if not part:
                continue
            prompts, reference = self._prompts(part), self._reference(part)
            for batch, _ in self._micro_batches(part):
                loss_N, seen = self._token_losses(batch, prompts, reference)
                (loss_N.sum() / divisor).backward()
                stats.append(seen)
                places += batch.places
                padded += batch.places - batch.tokens
            prompts.backward()
            places += prompts.places
            padded += prompts.places - prompts.tokens
        lr = float(self.schedule.get_last_lr()[0])
        norm = self._step()
        return UpdateResult(
            stats=stats,
            gradient_norm=norm,
            lr=lr,
            sequences=len(samples),
            skipped_sequences=0 if needs_idle else len(idle),
            places=places,
            padded_places=padded,
        )

    def _token_losses(
        self, batch: Batch, prompts: SharedPrompts, reference: SharedPrompts | None
    ) -> tuple[Tensor, TokenStats]:
        config = self.config
        divergence_N = torch.empty_like(batch.advantage_N)

        def measure(rows: slice, log_pi_CV: Tensor) -> None:
            logp_pi_C = log_pi_CV.gather(-1, batch.token_N[rows, None]).squeeze(-1)
            support = config.approx.support(batch.anchor[rows], batch.token_N[rows], logp_pi_C, log_pi_CV)
            divergence_N[rows] = config.divergence(*support)

        logp_pi_N, entropy_N = self._log_probs(batch, prompts, measure)
        tokens = Tokens(
            logp_pi_N=logp_pi_N,
            logp_mu_N=batch.mu.logp_N,
            logp_anchor_N=batch.anchor.logp_N,
            advantage_N=batch.advantage_N,
            divergence_N=divergence_N,
            sequence_N=batch.row_N,
            delta_low=config.divergence.delta_low,
            delta_high=config.divergence.delta_high,
        )
        loss_N, keep_N = config.objective(tokens)
        reference_kl_N = torch.zeros_like(divergence_N)
        if reference is not None:
            with torch.no_grad(), self.policy.without_adapter():
                logp_ref_N, _ = self._log_probs(batch, reference, None)
            loss_N = loss_N + config.kl_to_reference * kl_to_reference(logp_pi_N, logp_ref_N, batch.mu.logp_N)
            reference_kl_N = logp_pi_N.detach() - logp_ref_N
        return loss_N, TokenStats.collect(batch, tokens, keep_N, entropy_N, reference_kl_N)

    def _reference(self, samples: Sequence[tuple[int, Sample]]) -> SharedPrompts | None:
        """The prompts as the base sees them, for KL(pi || ref)."""
        if self.config.kl_to_reference == 0:
            return None
        with torch.no_grad(), self.policy.without_adapter():
            return self._prompts(samples)

    def _log_probs(self, batch: Batch, prompts: SharedPrompts, visit: Visitor | None) -> tuple[Tensor, Tensor]:
        hidden_NH = prompts.predicting_states(batch)
        return token_log_probs(self.head, hidden_NH, batch.token_N, self.config.hardware.head_chunk, visit)

    @torch.no_grad()
    def _report(self, batch: Batch, prompts: SharedPrompts) -> PolicyReport:
        """What the policy reports of a batch now, in the form that the approximation needs."""
        k = self.config.approx.num_logprobs
        if k == WHOLE_VOCABULARY:
            hidden_NH = prompts.predicting_states(batch)
            logp_N, _ = token_log_probs(self.head, hidden_NH, batch.token_N, self.config.hardware.head_chunk)
            return PolicyReport(logp_N, hidden_NH=hidden_NH, head=self.head)
        ids: list[Tensor] = []
        values: list[Tensor] = []

        def keep_top(_: slice, log_pi_CV: Tensor) -> None:
            values_CK, ids_CK = top_k(log_pi_CV, k)
            ids.append(ids_CK)
            values.append(values_CK)

        logp_N, _ = self._log_probs(batch, prompts, keep_top if k else None)
        return PolicyReport(logp_N, torch.cat(ids), torch.cat(values)) if k else PolicyReport(logp_N)

    def _step(self) -> float:
        limit = self.config.optim.max_grad_norm
        norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters, math.inf if limit is None else limit))
        if not math.isfinite(norm):
            raise NumericalError(
                f"the gradient is {norm}; nothing was updated. Try a lower optim.lr or objective.ratio_cap"
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=False)
        return norm

    def _micro_batches(self, samples: Sequence[tuple[int, Sample]]) -> Iterator[tuple[Batch, list[int]]]:
        for part in self._split([s for _, s in samples]):
            chosen = [samples[i] for i in part]
            yield Batch.pack([s for _, s in chosen], self.policy.pad_id, self.policy.device), [i for i, _ in chosen]

    def _split(self, samples: Sequence[Sample]) -> list[list[int]]:
        prompts = [len(s.completion.prompt.token_ids) for s in samples]
        responses = [s.completion.token_ids_T.shape[0] for s in samples]
        budget = self.config.hardware.tokens_per_micro_batch
        if can_share(self.policy):
            return split_by_tokens(responses, prompts, budget)
        return split_by_tokens([p + r for p, r in zip(prompts, responses, strict=True)], [0] * len(samples), budget)

    def _prompts(self, samples: Sequence[tuple[int, Sample]]) -> SharedPrompts:
        budget = self.config.hardware.tokens_per_micro_batch
        return SharedPrompts(self.policy, (s.completion.prompt.token_ids for _, s in samples), budget)


def lr_factor(update: int, total_updates: int, optim: AdamW) -> float:
    """What the learning rate is multiplied by at update 0, 1, ...: linear warm-up, then constant or cosine to 0."""
    if update < optim.warmup_updates:
        return (update + 1) / optim.warmup_updates
    if optim.schedule == "constant":
        return 1.0
    progress = (update - optim.warmup_updates) / max(1, total_updates - optim.warmup_updates)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
