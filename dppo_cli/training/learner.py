"""The update: from groups to a step of the optimizer.

A mini-batch is cut into micro-batches by a token budget. The sum of token losses is divided by one number known before
the first of them runs, so the gradient is the same however it is cut.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dppo_cli.algorithm.aggregation import Aggregation
from dppo_cli.algorithm.approx import WHOLE_VOCABULARY
from dppo_cli.algorithm.loss import Loss, Visitor
from dppo_cli.config.sections import AdamW, Hardware
from dppo_cli.errors import NumericalError
from dppo_cli.kernels import devices
from dppo_cli.kernels.top_k import top_k
from dppo_cli.policy.choice import choose_for
from dppo_cli.policy.forward import Forward
from dppo_cli.policy.head import token_log_probs
from dppo_cli.policy.policy import Policy
from dppo_cli.training.batches import samples_of
from dppo_cli.training.failures import check_finite, is_out_of_memory, named
from dppo_cli.training.files import as_count
from dppo_cli.training.optimizer import lr_factor, make_optimizer, moments_of, restored
from dppo_cli.training.sample_stats import KeptSamples
from dppo_cli.training.trainer import UpdateResult
from dppo_cli.types import Batch, Group, PolicyReport, Sample
from dppo_cli.world import World


class Learner:
    """Trains in this process; see `Trainer`. Owns the optimizer.

    An update has two halves, so that several processes can share it: each has the gradient of its part of the groups,
    and then all take the same step.
    """

    def __init__(
        self,
        policy: Policy,
        loss: Loss,
        aggregation: Aggregation,
        optim: AdamW,
        hardware: Hardware,
        *,
        temperature: float,
        max_new_tokens: int,
        total_updates: int,
        warn: Callable[[str], None],
        forward: type[Forward] | None = None,
        world: World | None = None,
    ) -> None:
        """`temperature`, `max_new_tokens`: of the rollouts. `total_updates`: of the whole run, for the schedule.

        `world`: the processes whose gradients a step sums.
        """
        self.policy, self.loss, self.aggregation, self.optim, self.hardware = policy, loss, aggregation, optim, hardware
        self.head = policy.head.at(temperature)
        self.max_new_tokens = max_new_tokens
        self.warn = warn
        self.budget = hardware.tokens_per_micro_batch
        self.forward = forward  # None: the one that suits the samples
        self.world = world or World()
        self.optimizer = make_optimizer(policy.parameters, optim, policy.device)
        # Allocated once: during the first backward pass they would fragment the memory that it frees. After a batch of
        # which every sample was skipped they are zero, not None.
        for parameter in policy.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda update: lr_factor(update, total_updates, optim)
        )

    def anchored(self, groups: Sequence[Group]) -> list[Group]:
        prompts, samples = samples_of(groups)
        if not samples:
            return list(groups)
        found: dict[int, PolicyReport] = {}
        with torch.no_grad():
            forward = self._open(prompts, samples)
        for batch, indices in self._micro_batches(prompts, samples, forward):
            report = self._report(batch, forward)
            for b, index in enumerate(indices):
                found[index] = report[batch.row_N == b].to(torch.device("cpu"))
        anchors = iter([found[i] for i in range(len(samples))])
        return [replace(group, anchors=[next(anchors) for _ in group.completions]) for group in groups]

    def update(self, groups: Sequence[Group]) -> UpdateResult:
        found = self.gradient(groups, self.divisor(groups))
        return replace(found, gradient_norm=self.step())

    def gradient(self, groups: Sequence[Group], divisor: float) -> UpdateResult:
        """The first half of an update: the gradient of the sum of token losses over `divisor`, and what was seen.

        Samples with A = 0 get no forward pass where nothing but the advantage gives a gradient: it would be zero. Where
        memory does not suffice, it is repeated with micro-batches of half the size. Raises NumericalError if a loss is
        not finite.
        """
        random_state, device = torch.get_rng_state(), self.policy.device
        of_device = devices.random_state(device)
        try:
            while True:
                try:
                    return self._backward(groups, divisor)
                except RuntimeError as error:
                    if not is_out_of_memory(error) or self.budget <= 1:
                        raise
                # Outside the handler, whose exception holds on to the tensors of the failed pass.
                self.drop_gradient()
                torch.set_rng_state(random_state)
                self.budget = max(1, self.budget // 2)
                devices.set_random_state(device, of_device)
                devices.empty_cache(device)
                self.warn(
                    f"out of memory in an update: repeated with hardware.tokens_per_micro_batch={self.budget}, which "
                    "this run uses from here on"
                )
        except BaseException:
            self.drop_gradient()
            raise

    def step(self, check: Callable[[], None] = lambda: None) -> float:
        """The second half: a step of the optimizer along the gradients of all processes; returns their sum's norm.

        Never repeated: smaller micro-batches would not help it, and it may have changed some weights. `check`: see
        `World.sum`.
        """
        try:
            self.world.sum([p.grad for p in self.policy.parameters if p.grad is not None], check)
            limit = self.optim.max_grad_norm
            norm = float(torch.nn.utils.clip_grad_norm_(self.policy.parameters, math.inf if limit is None else limit))
            if not math.isfinite(norm):
                raise NumericalError(
                    f"the gradient is {norm}; nothing was updated. Try a lower optim.lr or objective.ratio_cap"
                )
            self.optimizer.step()
            self.schedule.step()
            return norm
        finally:
            self.drop_gradient()

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=False)

    def skipped(self, groups: Sequence[Group]) -> UpdateResult:
        lr = float(self.schedule.get_last_lr()[0])
        with warnings.catch_warnings():
            # torch expects a step of the optimizer before each one of the schedule.
            warnings.simplefilter("ignore")
            self.schedule.step()
        sequences = sum(len(group.completions) for group in groups)
        return UpdateResult([], [], None, lr, sequences, 0, 0, 0)

    def divisor(self, groups: Sequence[Group]) -> float:
        """Of the sum of an update's token losses."""
        completions = [completion for group in groups for completion in group.completions]
        num_tokens = sum(completion.mu.logp_N.shape[0] for completion in completions)
        return self.aggregation.divisor(num_tokens, len(completions), self.max_new_tokens)

    def _backward(self, groups: Sequence[Group], divisor: float) -> UpdateResult:
        prompts, samples = samples_of(groups)
        # Samples without advantage run last and separately, so that skipping them does not change the other sums.
        useful = [s for s in samples if s.advantage != 0]
        idle = [s for s in samples if s.advantage == 0]
        stats, kept, positions, tokens = [], [], 0, 0
        for part in (useful, idle) if self.loss.needs_all_tokens else (useful,):
            if not part:
                continue
            forward, reference = self._open(prompts, part), self._open_reference(prompts, part)
            for batch, indices in self._micro_batches(prompts, part, forward):
                logp_ref_N = None if reference is None else self._reference_log_probs(batch, reference)
                looking = KeptSamples([part[i] for i in indices], batch.mu)
                try:
                    loss_N, seen = self.loss(batch, looking.at(partial(self._log_probs, batch, forward)), logp_ref_N)
                    check_finite(loss_N)
                except NumericalError as error:
                    raise named(error, batch, looking.samples, groups) from None
                (loss_N.sum() / divisor).backward()
                stats.append(seen)
                kept += looking.found(seen)
            forward.backward()
            positions += forward.num_positions
            tokens += forward.num_tokens
        lr = float(self.schedule.get_last_lr()[0])
        return UpdateResult(
            stats=stats,
            kept=kept,
            gradient_norm=None,
            lr=lr,
            sequences=len(samples),
            skipped_sequences=0 if self.loss.needs_all_tokens else len(idle),
            num_positions=positions,
            num_padding=positions - tokens,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"adapter.{name}": p.detach() for name, p in self._named_parameters()}
        for name, parameter in self._named_parameters():
            moments = moments_of(self.optimizer, parameter)
            tensors |= {f"optimizer.{key}.{name}": value for key, value in moments.items()}
        return tensors, {"updates": self.schedule.last_epoch, "budget": self.budget}

    def load_state(self, tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
        moments: dict[int, dict[str, Any]] = {}
        index_of = {name: index for index, (name, _) in enumerate(self._named_parameters())}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, kind, name = key.split(".", 2)
                moments.setdefault(index_of[name], {})[kind] = restored(value)
        for name, parameter in self._named_parameters():
            parameter.data.copy_(tensors[f"adapter.{name}"])
        self.schedule.last_epoch, self.budget = as_count(plain["updates"]), as_count(plain["budget"], least=1)
        groups = self.optimizer.state_dict()["param_groups"]
        for group in groups:
            group["lr"] = self.optim.lr * self.schedule.lr_lambdas[0](plain["updates"])
        self.schedule._last_lr = [group["lr"] for group in groups]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})

    def _named_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.policy.model.named_parameters() if p.requires_grad]

    def _log_probs(self, batch: Batch, forward: Forward, visit: Visitor | None) -> tuple[Tensor, Tensor]:
        hidden_NH = forward.predicting_states(batch)
        return token_log_probs(self.head, hidden_NH, batch.token_N, self.hardware.head_chunk, visit)

    def _reference_log_probs(self, batch: Batch, reference: Forward) -> Tensor:
        with torch.no_grad(), self.policy.without_adapter():
            return self._log_probs(batch, reference, None)[0]

    @torch.no_grad()
    def _report(self, batch: Batch, forward: Forward) -> PolicyReport:
        """What the policy reports of a batch now, in the form that the approximation needs."""
        k = self.loss.approx.num_logprobs
        if k == WHOLE_VOCABULARY:
            hidden_NH = forward.predicting_states(batch)
            logp_N, _ = token_log_probs(self.head, hidden_NH, batch.token_N, self.hardware.head_chunk)
            return PolicyReport(logp_N, hidden_NH=hidden_NH, head=self.head)
        ids: list[Tensor] = []
        values: list[Tensor] = []

        def keep_top(_: slice, log_pi_CV: Tensor) -> None:
            values_CK, ids_CK = top_k(log_pi_CV, k)
            ids.append(ids_CK)
            values.append(values_CK)

        logp_N, _ = self._log_probs(batch, forward, keep_top if k else None)
        return PolicyReport(logp_N, torch.cat(ids), torch.cat(values)) if k else PolicyReport(logp_N)

    def _open(self, prompts: Sequence[Sequence[int]], samples: Sequence[Sample]) -> Forward:
        """The prompts of `samples`, each once."""
        used = {n: prompts[n] for n in dict.fromkeys(s.prompt for s in samples)}
        kind = self.forward or choose_for(self.policy, used, _lengths(prompts, samples), self.budget)
        return kind(self.policy, used, self.budget)

    def _open_reference(self, prompts: Sequence[Sequence[int]], samples: Sequence[Sample]) -> Forward | None:
        """The same as the base sees them, for KL(pi || ref)."""
        if self.loss.kl_weight == 0:
            return None
        with torch.no_grad(), self.policy.without_adapter():
            return self._open(prompts, samples)

    def _micro_batches(
        self, prompts: Sequence[Sequence[int]], samples: Sequence[Sample], forward: Forward
    ) -> Iterator[tuple[Batch, list[int]]]:
        """Batches, and which of `samples` are in each."""
        for part in forward.split(_lengths(prompts, samples), self.budget):
            yield Batch.pack([samples[i] for i in part], prompts, self.policy.pad_id, self.policy.device), part


def _lengths(prompts: Sequence[Sequence[int]], samples: Sequence[Sample]) -> list[tuple[int, int, int]]:
    """As `Forward.split` takes them."""
    return [(s.prompt, len(prompts[s.prompt]), len(s.completion.token_ids_T)) for s in samples]
