"""Prompts, completions and policies for tests, made by hand or by a tiny model."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dppo_cli.algorithm.approx import Approximation
from dppo_cli.algorithm.divergence import Divergence
from dppo_cli.algorithm.filters import Filter, KeepAll
from dppo_cli.algorithm.loss import Loss
from dppo_cli.algorithm.objective import Objective
from dppo_cli.algorithm.region import PerToken, Region
from dppo_cli.commands.schemas import TrainConfig
from dppo_cli.policy.forward import hidden_states
from dppo_cli.policy.loading import load_policy
from dppo_cli.policy.policy import Policy
from dppo_cli.types import Completion, Example, Group, PolicyReport, Prompt, Score, Status, TokenStats

MIXED = ("1+2=", "hello world foo bar", "a", "12+34= abcdefgh ijk lmn")
"""Prompts of different lengths, so that a batch is padded; the longest ones outgrow the windows of tests/tiny.py."""

BEGINNING = "Please answer with a number: "
ALIKE = tuple(BEGINNING + rest for rest in ("1+2=", "12+34+56=", "7", "8"))
"""Prompts with a common beginning that is worth running once."""


def policy(config: TrainConfig, *, adapter_scale: float = 0.0, seed: int = 0) -> Policy:
    """The config's model with a fresh adapter; `adapter_scale` > 0 gives the adapter an effect."""
    made = load_policy(
        config.model,
        config.hardware,
        warn=fail,
        adapter=config.adapter,
        seed=config.seed,
    )
    if adapter_scale:
        move_adapter(made, adapter_scale, seed)
    return made


def fail(text: str) -> None:
    """A `warn` for what should have nothing to warn of."""
    raise AssertionError(f"unexpected warning: {text}")


def plain_policy(folder: Path, config: TrainConfig) -> Policy:
    """A model without an adapter."""
    return load_policy(replace(config.model, path=str(folder)), config.hardware, warn=fail)


def move_adapter(of: Policy, scale: float, seed: int = 0) -> None:
    """Set the half of the adapter that starts at zero to normal random numbers of standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in of.model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))


def prompts(of: Policy, texts: Sequence[str] = MIXED) -> list[Prompt]:
    return [Prompt(i, Example(text, ""), tuple(of.tokenizer(text)["input_ids"])) for i, text in enumerate(texts)]


def prompt(index: int = 0, ids: Sequence[int] = (3,), answer: str = "", **columns: Any) -> Prompt:
    """One made by hand."""
    return Prompt(index, Example(f"prompt {index}", answer, columns), tuple(ids))


def completion(
    token_ids: Sequence[int] = (5,),
    *,
    text: str = "",
    logp: Sequence[float] | None = None,
    sampled: Sequence[bool] | None = None,
    status: Status = Status.FINISHED,
) -> Completion:
    """One made by hand; log mu defaults to -1 for each sampled token."""
    sampled_T = torch.tensor([True] * len(token_ids) if sampled is None else list(sampled))
    logp_N = torch.tensor([-1.0] * int(sampled_T.sum()) if logp is None else list(logp))
    return Completion(torch.tensor(list(token_ids)), sampled_T, PolicyReport(logp_N), text, status, (0,))


def groups(
    of: Sequence[Prompt], completions: Sequence[Sequence[Completion]], advantages: Iterable[float]
) -> list[Group]:
    """`advantages`: one for each completion, in order."""
    rest = iter(advantages)
    return [
        Group(p, row, [Score(0.0)] * len(row), [next(rest) for _ in row])
        for p, row in zip(of, completions, strict=True)
    ]


def flat(completions: Sequence[Sequence[Completion]]) -> list[Completion]:
    """The completions of all prompts, one after the other."""
    return [c for row in completions for c in row]


def reported(completions: Sequence[Sequence[Completion]]) -> PolicyReport:
    """What was reported of all completions, one after the other."""
    return PolicyReport.cat([c.mu for c in flat(completions)])


@torch.no_grad()
def trained_log_probs(
    of: Policy, prompts: Sequence[Prompt], completions: Sequence[Sequence[Completion]], temperature: float
) -> Tensor:
    """log pi at every sampled token, [N, V], in the order of `completions`: a forward pass for each, no padding."""
    rows = []
    for p, row in zip(prompts, completions, strict=True):
        for c in row:
            ids = torch.tensor([[*p.token_ids, *c.token_ids_T.tolist()]])
            # The state at the position before each token predicts it.
            rows.append(hidden_states(of, ids)[0, len(p.token_ids) - 1 : -1][c.sampled_T])
    return of.head.at(temperature).log_probs(torch.cat(rows))


def tokens(completions: Sequence[Sequence[Completion]]) -> list[list[int]]:
    return [c.token_ids_T.tolist() for c in flat(completions)]


def token_stats(
    mu: Sequence[float],
    pi: Sequence[float],
    advantage: Sequence[float],
    keep: Sequence[bool] | None = None,
    token: Sequence[int] | None = None,
    divergence: Sequence[float] | None = None,
    entropy: float = 0.0,
    reference_kl: float = 0.0,
    filtered: Sequence[bool] | None = None,
    undecided: Sequence[bool] | None = None,
) -> TokenStats:
    """Token statistics by hand: tokens of id 0 that the mask kept, unless said otherwise."""
    mu_N, pi_N = torch.tensor(mu), torch.tensor(pi)
    return TokenStats(
        token_N=torch.tensor(token or [0] * len(mu)),
        mu_N=mu_N,
        pi_N=pi_N,
        log_ratio_N=pi_N.log() - mu_N.log(),
        divergence_N=torch.tensor(divergence or [0.0] * len(mu)),
        advantage_N=torch.tensor(advantage),
        keep_N=torch.tensor(keep or [True] * len(mu)),
        entropy_N=torch.full((len(mu),), entropy),
        reference_kl_N=torch.full((len(mu),), reference_kl),
        filtered_N=torch.tensor(filtered or [False] * len(mu)),
        undecided_N=None if undecided is None else torch.tensor(undecided),
    )


def loss(
    approx: Approximation,
    divergence: Divergence,
    objective: Objective,
    kl_weight: float,
    *,
    verdict: str = "lower",
    region: Region | None = None,
    filter: Filter | None = None,
) -> Loss:
    """With the plain region and without a filter, unless given."""
    return Loss(approx, divergence, verdict, region or PerToken(), filter or KeepAll(), objective, kl_weight)
