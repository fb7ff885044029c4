"""What an export is compared on: responses that the trained policy samples to held-out prompts, and their logits."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dppo_cli.commands.assembly import in_turns
from dppo_cli.commands.problems import prompting_with
from dppo_cli.commands.schemas import ExportConfig
from dppo_cli.config.sections import Sampling
from dppo_cli.errors import ModelError
from dppo_cli.policy.policy import Policy
from dppo_cli.rollout.engine import in_order
from dppo_cli.telemetry.table import print_warning
from dppo_cli.training.agreement import agreement
from dppo_cli.training.evaluation import EvalResult, evaluate

PROBE_PROMPTS, PROBE_TOKENS = 8, 32
"""Prompts, and tokens of a response to each, on which the export and the trained policy are compared."""

Probe = tuple[list[int], int]
"""Token ids of a prompt with its response, and how many are the prompt's."""


def make_probes(policy: Policy, config: ExportConfig) -> list[Probe]:
    """Held-out prompts with responses that the policy samples. Raises ModelError for a prompt that leaves no room."""
    prompts = policy.encode(config.data.load(print_warning).heldout[:PROBE_PROMPTS], config.prompt)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    room = PROBE_TOKENS if policy.positions is None else min(PROBE_TOKENS, policy.positions - longest)
    if room < 1:
        raise ModelError(f"a prompt has {longest} tokens, and {config.model.path} has {policy.positions} positions")
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, max_new_tokens=room, stop=[])
    with config.rollout.load(policy, print_warning) as engine:
        engine.sync(0)
        sampled = in_order(engine.generate(prompts, 1, sampling, 0, config.seed))
    return [
        ([*prompt.token_ids, *completion.token_ids_T.tolist()], len(prompt.token_ids))
        for prompt, completions in zip(prompts, sampled, strict=True)
        for completion in completions
    ]


@torch.no_grad()
def logits_of(model: PreTrainedModel, policy: Policy, probes: Sequence[Probe]) -> list[Tensor]:
    """Logits that predict the responses' tokens, float32 [T, V] each."""
    found = []
    with policy.autocast():
        for ids, prompt in probes:
            logits_LV = model(input_ids=torch.tensor([ids], device=policy.device)).logits[0]
            found.append(logits_LV[prompt - 1 : -1].float().cpu())
    return found


def check_same(expected: Sequence[Tensor], found: Sequence[Tensor], share: float, problem: str) -> None:
    """Raise ModelError if logits differ by more than this share of the largest."""
    difference = agreement(expected, found).logit
    largest = max(float(logits.abs().max()) for logits in expected)
    if not difference <= share * max(1.0, largest):  # so that NaN is a difference, too
        raise ModelError(
            f"{problem}: logits differ by {difference:.2g} (largest logit {largest:.2g}); nothing was written"
        )


def accuracy(policy: Policy, config: ExportConfig) -> EvalResult:
    """On the run's held-out problems, sampled as in its evaluations unless the user says otherwise."""
    environment = config.environment.load(print_warning)
    prompting = prompting_with(environment, config.prompt, policy.encoder)
    prompts = policy.encode(config.data.load(print_warning).heldout, prompting)
    scorer = config.reward.load(print_warning)
    with in_turns(config.rollout.load(policy, print_warning), environment, policy, prompting) as engine:
        engine.sync(0)
        of = config.eval
        return evaluate(engine, prompts, scorer, config.sampling, of.samples_per_prompt, of.success_reward, config.seed)
