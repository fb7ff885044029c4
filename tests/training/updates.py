"""What tests of the update share: groups that a tiny model sampled, and a dense implementation of the gradient."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import make
import torch
from torch import Tensor

from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.training.learner import Learner
from dppo_cli.training.trainer import UpdateResult
from dppo_cli.types import Completion, Group, PolicyReport

ADVANTAGES = (1.0, -0.5, 0.25, -1.5, 0.75, 2.0, -1.0, 0.5)
"""Of two samples of each of the four prompts of `make.MIXED`."""
UNCLIPPED = "optim.max_grad_norm=null"
MASKING = ("divergence.delta_low=0.01", "divergence.delta_high=0.01")
OVER_RESPONSES = (
    ("region=prefix_budget", "region.budget=0.05"),
    ("region=sequence_mean", "region.upper=0.5"),
    ("filter=k3", "filter.high=0.3"),
)
"""Regions and a filter that look at whole responses; they touch some of those of `off_policy`, and not all."""


def rollout(
    of: Policy, config: TrainConfig, advantages: Sequence[float] = ADVANTAGES, samples_per_prompt: int = 2
) -> list[Group]:
    """Groups of the policy as it is, their responses of different lengths, with the given advantages."""
    prompts = make.prompts(of)
    with config.rollout.load(of, make.fail) as engine:
        engine.sync(version=0)
        sampled = in_order(
            engine.generate(prompts, samples_per_prompt, config.sampling, config.approx.num_logprobs, seed=5)
        )
    return make.groups(prompts, sampled, advantages)


def off_policy(
    config: TrainConfig, advantages: Sequence[float] = ADVANTAGES, samples_per_prompt: int = 2
) -> tuple[Policy, list[Group]]:
    """A policy, and groups that it sampled before its adapter moved. Equal calls give equal weights and samples."""
    policy = make.policy(config, adapter_scale=0.05, seed=1)
    groups = rollout(policy, config, advantages, samples_per_prompt)
    make.move_adapter(policy, 0.08, seed=2)
    return policy, groups


def broken(groups: Sequence[Group], g: int, i: int, logp_N: Tensor) -> list[Group]:
    """The groups with other log-probs and an advantage of 1 for one sample."""
    completions, advantages = list(groups[g].completions), list(groups[g].advantages)
    completions[i], advantages[i] = replace(completions[i], mu=PolicyReport(logp_N)), 1.0
    return [*groups[:g], replace(groups[g], completions=completions, advantages=advantages), *groups[g + 1 :]]


def completions(groups: Sequence[Group]) -> list[Completion]:
    """Those of all groups, one after the other."""
    return make.flat([group.completions for group in groups])


def response_lengths(groups: Sequence[Group]) -> list[int]:
    return [len(c.token_ids_T) for c in completions(groups)]


def with_budget(config: TrainConfig, tokens_per_micro_batch: int, head_chunk: int | None = None) -> TrainConfig:
    """The config with batches cut in another way."""
    chunk = head_chunk or config.hardware.head_chunk
    hardware = replace(config.hardware, tokens_per_micro_batch=tokens_per_micro_batch, head_chunk=chunk)
    return replace(config, hardware=hardware)


def gradient(learner: Learner, groups: Sequence[Group]) -> tuple[list[Tensor], UpdateResult]:
    """The gradient that the optimizer sees in one update."""
    seen: list[Tensor] = []

    def look(optimizer: Any, args: Any, kwargs: Any) -> None:
        seen.extend(p.grad.clone() for p in learner.policy.parameters)

    hook = learner.optimizer.register_step_pre_hook(look)
    result = learner.update(groups)
    hook.remove()
    return seen, result


def dense_gradient(policy: Policy, config: TrainConfig, groups: Sequence[Group]) -> list[Tensor]:
    """DPPO on the binary total variation, with full logits and plain autograd, a sequence at a time."""
    count = sum(int(c.sampled_T.sum()) for c in completions(groups))
    delta, cap = config.divergence, config.objective.ratio_cap
    total = torch.zeros(())

    def log_probs(prompt: list[int], completion: Completion) -> Tensor:
        response = completion.token_ids_T
        logits_LV = policy.model(input_ids=torch.tensor([prompt + response.tolist()])).logits[0]
        log_pi_TV = (logits_LV[len(prompt) - 1 : -1] / config.sampling.temperature).log_softmax(-1)
        return log_pi_TV.gather(-1, response[:, None])[:, 0][completion.sampled_T]

    for group in groups:
        prompt = list(group.prompt.token_ids)
        for completion, advantage in zip(group.completions, group.advantages, strict=True):
            mu_N, pi_N = completion.mu.logp_N, log_probs(prompt, completion)
            ratio_N = (pi_N.detach() - mu_N).exp()
            tv_N = (pi_N.detach().exp() - mu_N.exp()).abs()
            if advantage > 0:
                keep_N = ~((ratio_N > 1) & (tv_N > delta.delta_high))
            else:
                keep_N = ~((ratio_N < 1) & (tv_N > delta.delta_low))
            weight_N = keep_N * (ratio_N.clamp(max=cap) if cap else ratio_N) * advantage
            total = total - (weight_N * pi_N).sum() / count
            if config.kl_to_reference:
                with torch.no_grad(), policy.without_adapter():
                    ref_N = log_probs(prompt, completion)
                # E_pi[(log pi - log ref) grad log pi] by importance weights: the gradient of KL(pi || ref).
                total = total + config.kl_to_reference * (ratio_N * (pi_N.detach() - ref_N) * pi_N).sum() / count
    policy.model.zero_grad()
    total.backward()
    found = [p.grad.clone() for p in policy.parameters]
    policy.model.zero_grad()
    return found


def assert_equal_gradients(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 5e-6) -> None:
    """To `tolerance`, relative to the largest entry of each."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        scale = float(b.abs().max())
        assert scale > 0
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=tolerance)


def assert_identical(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def parameters(policy: Policy) -> list[Tensor]:
    """A copy of what is trained."""
    return [p.detach().clone() for p in policy.parameters]


def masked(result: UpdateResult) -> int:
    return sum(int((~part.keep_N).sum()) for part in result.stats)
